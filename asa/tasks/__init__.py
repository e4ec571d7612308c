"""Tasks: one file each with its data, method, validation, prediction and evaluation; and what runs them."""

# What a command's composed configuration is handed to, as "module:function". Names only: importing them imports torch.
COMMANDS = {
    "prepare": "asa.tasks.preparation:prepare_task",
    "pretrain": "asa.tasks.run:pretrain_task",
    "finetune": "asa.tasks.studies:finetune_task",
    "predict": "asa.tasks.run:predict_task",
    "evaluate": "asa.tasks.run:evaluate_task",
    "ablate": "asa.tasks.studies:ablate",
    "embed": "asa.tasks.embedding:embed_task",
}
