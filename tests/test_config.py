"""Configurations compose, build, and explain what is wrong with them."""

import dataclasses
import importlib
import re

import pytest
import torch
import yaml

from asa.cli.manual import sections
from asa.config import (
    CONFIG_DIR,
    METHODS,
    SETTINGS,
    as_overrides,
    build,
    choices,
    compose,
    flatten,
    typed,
)
from asa.data.preprocessing.settings import PrepareSettings
from asa.data.splits import make_split
from asa.settings import OptimSettings, TrainSettings
from asa.tasks.checks import check
from asa.tasks.run import find_task

EXPERIMENTS = {
    "asa_paper_prepare": "prepare",
    "asa_paper": "pretrain",
    "asa_fast": "pretrain",
    "asa_paper_finetune": "finetune",
    "brats21": "finetune",
    "ibsr": "finetune",
    "wmh": "finetune",
    "linear_probe": "finetune",
    "brats_demo": "finetune",
    "wmh_demo": "finetune",
    "oasis_pretrain": "pretrain",
    "oasis_finetune": "finetune",
    "structures_ablation": "ablate",
    "tables_pretrain": "pretrain",
    "table2": "ablate",
    "table3": "ablate",
    "table4": "ablate",
    "structures_pretrain": "pretrain",
    "structures_finetune": "finetune",
    "structures_light": "finetune",
    "planted_lesions": "finetune",
    "rat_ct_denoise": "finetune",
    "rat_pet": "finetune",
    "rat_sr": "finetune",
    "demo_pretrain": "pretrain",
    "sa_swin_paper": "pretrain",
    "sa_swin_classify": "finetune",
    "brain_age": "finetune",
    "sa_swin_segment": "finetune",
    "sa_swin_demo": "pretrain",
    "demo_finetune": "finetune",
    "tissues_demo": "finetune",
    "aseg": "finetune",
}


def located(target: str) -> type:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def composed(command: str, *overrides: str) -> dict:
    return compose(command, ["out=x", "data.store=y", *overrides])


def built(command: str, *overrides: str):
    config = composed(command, *overrides)
    node = config["method"]
    node["model"]["in_channels"] = 1
    if node["model"].get("img_size", 128) is None:
        node["model"]["img_size"] = 128
    if command == "finetune":
        for key in {"classes", "out_channels"} & node["model"].keys():
            node["model"][key] = 4
        for key in {"mean", "sd"} & node["model"].keys():
            node["model"][key] = 1.0
    if node.get("regions", {}) is None:
        node["regions"] = {"WT": [1, 2], "TC": [2], "a": [3], "b": [4]}
    if node.get("weights") == "balanced":  # the command counts the classes
        node["weights"] = None
    for key, cls in SETTINGS[command].items():
        assert isinstance(typed(cls, config[key]), cls)
    with torch.device("meta"):
        return build(node)


def test_no_experiment_chooses_a_precision() -> None:
    """It is the machine's to choose: bf16 is slow where it is emulated, and fp16 needs a GPU."""
    texts = {path.name: path.read_text() for path in (CONFIG_DIR / "experiment").glob("*.yaml")}
    assert [name for name, text in texts.items() if "precision:" in text] == []


def test_every_experiment_composes_and_builds() -> None:
    assert {path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")} == set(EXPERIMENTS)
    runs: dict[tuple[str, ...], None] = {}
    for experiment, command in EXPERIMENTS.items():
        if command == "prepare":
            assert isinstance(
                build(compose(command, ["out=x", f"experiment={experiment}"])["prepare"]), PrepareSettings
            )
        elif command == "ablate":
            config = compose(command, ["out=x", "store=y", f"experiment={experiment}"])
            for arm in config["arms"].values():
                for stage in ("pretrain", "finetune"):
                    runs[stage, *as_overrides(stage, config[stage], arm[stage] or {})] = None
        else:
            runs[command, f"experiment={experiment}"] = None
    for run in runs:  # each once: arms of several experiments are alike
        assert built(*run) is not None, run


@pytest.mark.parametrize("size", ["base", "small", "tiny"])
def test_every_model_composes_and_builds(size: str) -> None:
    for method in ("asa", "mae"):
        model = built("pretrain", f"model=asa_{size}", f"method={method}", "crop=[32,64,32]").model
        assert model.encoder.img_size == (32, 64, 32)
    for method, kinds in (("rpl", (2, 26)), ("jigsaw", (27, 100))):
        model = built("pretrain", f"model=puzzle_{size}", f"method={method}", "crop=[64,96,64]").model
        assert (model.pieces, model.answers) == kinds and model.encoder.img_size == (64, 96, 64)
    for name in ("unet", "vit_linear", "unetr", "swin_unetr"):
        assert built("finetune", f"model={name}_{size}", "crop=64").model.out_channels == 4
    order = built("finetune", f"model=unet_{size}", "crop=64", "method=regions").order
    assert order == [(0, 1), (1, 2), (2, 3), (3, 4)]
    model = built("finetune", "method=restore", f"model=rat_{size}", "model.upscale=2").model
    assert (model.upscale, model.in_channels) == (2, 1)
    assert built("finetune", "method=restore", f"model=restormer_{size}", "model.upscale=4").model.upscale == 4
    model = built("pretrain", f"model=sa_swin_{size}", "method=sa_swin", "crop=[32,32,64]").model
    assert model.encoder.img_size == (32, 32, 64)
    assert built("finetune", f"model=sa_swin_unet_{size}", "crop=64").model.out_channels == 4
    assert built("finetune", f"model=unet_{size}", "crop=64", "model.symmetry=true").mirrored
    for kind in ("asa", "sa_swin"):
        model = built("finetune", "method=classify", f"model={kind}_classifier_{size}", "crop=64").model
        assert model.head.out_features == 4 and model.mirrored == (kind == "sa_swin")
        model = built("finetune", "method=regress", f"model={kind}_regressor_{size}", "crop=64").model
        assert model.head.out_features == 1 and model.mirrored == (kind == "sa_swin")


@pytest.mark.parametrize("published", ["nnformer_base", "transbts_base", "resenc_l", "primus_m"])
def test_every_comparator_composes_and_builds(published: str) -> None:
    for name in (published, f"{published.rpartition('_')[0]}_tiny"):
        assert built("finetune", f"model={name}", "crop=64").model.out_channels == 4


def test_mae_is_the_same_class_with_both_ideas_off() -> None:
    asa, mae = (composed("pretrain", f"method={name}")["method"] for name in ("asa", "mae"))
    assert asa["_target_"] == mae["_target_"]
    assert (asa["importance"], asa["model"]["position"]) == ("orientation", "mirror")
    assert (mae["importance"], mae["model"]["position"]) == (None, "sincos")
    same = asa | {"importance": None, "model": {**asa["model"], "position": "sincos"}}
    assert list(mae.items()) == list(same.items())


def test_puzzles_have_the_size_that_their_method_sets() -> None:
    assert built("pretrain", "method=rpl").model.encoder.embed_dim == 192  # model=puzzle_small
    assert built("pretrain", "method=jigsaw", "method.permutations=30").model.answers == 30


def test_the_papers_settings_are_the_printed_ones() -> None:
    config = composed("pretrain", "experiment=asa_paper")
    optim = config["optim"]
    assert (config["train"]["batch_size"], config["crop"], config["method"]["mask_ratio"]) == (96, 128, 0.75)
    assert (optim["lr"], optim["reference_batch"], optim["betas"], optim["weight_decay"]) == (
        1.5e-4,
        256,
        [0.9, 0.95],
        0.05,
    )
    config = composed("finetune", "experiment=asa_paper_finetune")
    optim = config["optim"]
    assert (optim["name"], optim["lr"], optim["momentum"], optim["weight_decay"]) == ("sgd", 0.01, 0.99, 3e-5)
    assert (config["train"]["steps"], config["train"]["batch_size"], optim["schedule"]) == (250_000, 2, "poly")


SA_SWIN = ("sa_swin_paper", "sa_swin_classify", "sa_swin_segment")
PAPER = {"asa_paper": "pretrain", "asa_paper_finetune": "finetune", "asa_paper_prepare": "prepare"}
SOURCE = re.compile(r"# (printed \d\.\d|released|assumed)\b")


@pytest.mark.parametrize("experiment", [*PAPER, "brats21", "ibsr", "wmh", *SA_SWIN])
def test_every_setting_of_a_papers_experiment_names_its_source(experiment: str) -> None:
    lines = (CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    settings = [line for line in lines if re.match(r"\s*(- override )?[\w/]+: \S|\s+- override", line)]
    assert settings and [line for line in settings if not SOURCE.search(line)] == []


def test_the_table_of_the_papers_settings_holds_what_the_experiments_do() -> None:
    text = (CONFIG_DIR.parent / "docs" / "method.md").read_text()
    for experiment, command in PAPER.items():
        needed = [] if command == "prepare" else ["data.store=y"]
        config = flatten(compose(command, ["out=x", *needed, f"experiment={experiment}"]))
        table = re.search(rf"\| `{experiment}` \|.*\n\|---.*\n((?:\|.*\n)+)", text)
        assert table, experiment
        lines = (CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text().splitlines()
        sources = {line.split(":")[0].strip(): found[1] for line in lines if (found := SOURCE.search(line))}
        shown = {}
        for row in table[1].splitlines():
            key, printed, released, ours, _why = (cell.strip() for cell in row.strip("|").split("|"))
            shown[key.strip("`")] = typed_value(ours)
            source = sources.get(key.strip("`").split(".")[-1], "none")
            assert not (source.startswith("printed") and printed == "-"), key
            assert not (source == "released" and released == "-"), key
        assert shown == {key: config[key] for key in shown}
        settings = flatten(yaml.safe_load((CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text()))
        assert settings.keys() - {"defaults"} <= shown.keys()


def typed_value(text: str) -> object:
    value = yaml.safe_load(text)
    return float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value) else value


def test_the_papers_steps_are_epochs_of_its_cohort() -> None:
    optim, train = (composed("pretrain", "experiment=asa_paper")[key] for key in ("optim", "train"))
    epoch = (9952 + 2041) // train["batch_size"]
    assert (train["steps"], optim["warmup"], train["validate_every"]) == (1000 * epoch, 40 * epoch, 10 * epoch)


def test_sa_swin_has_its_released_settings() -> None:
    method = built("pretrain", "experiment=sa_swin_paper")
    assert not method.contrast.log_temperature.requires_grad and not method.model.saca.pre
    # Released: the losses of both views summed, with a weight of 0.5. Here they are averaged.
    assert method.weights == {"rotation": 1.0, "contrastive": 1.0, "inpainting": 1.0, "symmetry": 0.5 * 2}
    for experiment in ("sa_swin_classify", "sa_swin_segment"):
        method = built("finetune", f"experiment={experiment}")
        assert method.mirrored and not method.model.saca.pre
        assert composed("finetune", f"experiment={experiment}")["optim"]["lr"] == 1e-4


def test_the_papers_cohorts_differ_in_their_split_alone() -> None:
    shared = composed("finetune", "experiment=asa_paper_finetune")
    cohort = [{"subject": f"{k}"} for k in range(60)]
    for name, count, sizes in (("brats21", 60, [42, 6, 12]), ("ibsr", 18, [12, 0, 6]), ("wmh", 60, [36, 0, 24])):
        config = composed("finetune", f"experiment={name}")
        assert [len(part) for part in make_split(cohort[:count], **config["data"]["split"]).values()] == sizes
        config["data"]["split"] = shared["data"]["split"]
        assert config == shared


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
        ("trian.steps=3", "did you mean train.steps?"),
        ("optim.learning_rate=1", "unknown key optim.learning_rate"),
        ("data.splits=1", "did you mean data.split?"),
        ("train.steps=many", "train.steps=many: give a whole number, like 10000"),
        ("train.log_to=wandb", "train.log_to=wandb: give a list of names, like [tensorboard]"),
        ("optim.betas=[a,b]", "optim.betas[0]=a: give a list of numbers, like [0.9,0.95]"),
        ("optim.reference_batch=x", "optim.reference_batch=x: give a whole number, or null"),
        ("train.seed=null", "train.seed=null: give a whole number"),
        ("data.split={a b}", "cannot read data.split={a b}: a mapping is {name: value, other: value}"),
        ("crop=[32,32", "cannot read crop=[32,32: a list is [one, other]"),
        ("out=it's", "cannot read out=it's: quote a value with special characters"),
        ("model=asa_huge", "asa_small"),
        ("model=asa_tny", "did you mean asa_tiny? choose one of"),
        ("experiment=asa_papr", "did you mean asa_paper?"),
        ("method=sa_swim", "did you mean sa_swin? choose one of asa, jigsaw, mae, rpl, sa_swin"),
        ("train.steps", "train.steps"),
        ("lr=3", "did you mean optim.lr?"),
        ("model.windw=3", "lists them; +model.windw=... adds a keyword that the network takes)"),
        ("experiment=nope", "oasis_pretrain"),
        ("out=a,b", "quote a value with commas, as in \"out='a,b'\"; a list is out=[a,b]"),
        ("train=3", "train is a group of settings: give them one by one, like train.steps="),
        ("data.split=null", "data.split=null: it is a group of settings: give them one by one, like"),
        ("data.split=3", "data.split=3: it is a group of settings: give them one by one, like data.split.validation="),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_nearest_neighbour(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        composed("pretrain", override)
    assert "\n" not in str(error.value) and "_target_" not in str(error.value)


def test_a_key_inside_a_setting_that_is_given_whole_says_how() -> None:
    for command, key in (("run", "finetune.train.steps"), ("prepare", "labels.1")):
        whole, _, rest = key.partition(".")
        with pytest.raises(ValueError, match=re.escape(f"{key}: {whole} is given whole, as in '{whole}={{{rest}: ")):
            compose(command, [f"{key}=3"])


def test_restoration_has_the_released_settings() -> None:
    config = composed("finetune", "experiment=rat_sr")
    optim, train = config["optim"], config["train"]
    assert (optim["betas"], optim["lr"], optim["final_lr"], optim["schedule"]) == ([0.5, 0.999], 2e-4, 1e-6, "cosine")
    assert (train["steps"], train["batch_size"], config["method"]["beta"]) == (200000, 8, 1e-3)
    assert (config["model"]["_target_"], config["method"]["model"]["upscale"]) == ("asa.restoration.rat.rat_base", 4)


def test_mappings_of_the_users_own_keys_can_be_given_on_the_command_line() -> None:
    prepare = compose("prepare", ["out=x", "labels={1: a, 2: b}", "regions={whole: [1, 2]}"])
    assert (prepare["labels"], prepare["regions"]) == ({1: "a", 2: "b"}, {"whole": [1, 2]})
    ablate = compose("ablate", ["out=x", "store=y", "pretrain={model: asa_tiny}", "+pretrain.train.steps=5"])
    assert ablate["pretrain"] == {"model": "asa_tiny", "train": {"steps": 5}}


def test_mappings_of_the_users_own_keys_can_be_nested_in_python_and_their_keys_hold_any_mark() -> None:
    images, regions = {"t1": "*_T1.nii.gz", "t2": "*_T2.nii.gz"}, {"tumour (whole)": [1], "a:b, [c] {d}=e\\": [2]}
    nested = as_overrides("prepare", {"out": "x", "data": {"root": "y", "images": images}, "regions": regions})
    config = compose("prepare", nested)
    assert (config["data"]["root"], config["data"]["images"], config["regions"]) == ("y", images, regions)
    assert as_overrides("pretrain", {"data": {"split": {"test": 1}}}) == ["data.split.test=1"]


def test_a_tilde_is_the_home_folder_in_every_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {"checkpoint": ["~/a", "b~/c"], "input": "~/s", "out": "~/o", "images": {"t1": "~/*.nii.gz"}}
    config = compose("predict", as_overrides("predict", given))
    assert (config["checkpoint"], config["input"], config["out"]) == (
        ["/home/me/a", "b~/c"],
        "/home/me/s",
        "/home/me/o",
    )
    assert config["images"] == {"t1": "/home/me/*.nii.gz"}


def test_a_mapping_that_is_given_twice_is_named() -> None:
    own = ["data=folder", "data.root=x", "out=y", "labels={1: csf}", "labels={2: gm}"]
    with pytest.raises(ValueError, match=r"^labels= is given 2 times: give it once$"):
        compose("prepare", own)
    assert compose("prepare", own[:-1])["labels"] == {1: "csf"}


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"out.* has to be given"):
        compose("pretrain", ["data.store=y"])
    for command in ("pretrain", "finetune"):
        with pytest.raises(ValueError, match=r"data\.store.* has to be given"):
            check(command, compose(command, ["out=x"]))


@pytest.mark.parametrize("given", [["Dataset001_Deep"], ["scans", "out=x"], ["data.store", "=", "su"], ["out =su"]])
def test_words_that_are_no_settings_are_said_in_words(given: list[str]) -> None:
    advice = "settings are key=value, without blanks; quote values with blanks, as in \"input='my scans'\""
    with pytest.raises(ValueError, match=f"^{given[0]}: {advice}$"):
        compose("pretrain", given)


def test_a_value_may_have_blanks() -> None:
    assert compose("predict", ["out=x", "checkpoint=y", "input=my scans"])["input"] == "my scans"


@pytest.mark.parametrize("name", ["mine", "o'neil, (me)"])
def test_a_users_own_folder_of_experiments_is_found(tmp_path, name: str) -> None:
    tmp_path /= name
    (tmp_path / "experiment").mkdir(parents=True)
    mine = {"train": {"steps": 7}}
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(mine))
    config = compose("pretrain", ["out=x", "data.store=y", "experiment=mine"], config_dir=tmp_path)
    assert config["train"]["steps"] == 7
    with pytest.raises(ValueError, match=r"did you mean mine\?.* asa_paper.*, mine$"):
        compose("pretrain", ["out=x", "data.store=y", "experiment=mien"], config_dir=tmp_path)


def test_build_makes_targets_of_this_package_only() -> None:
    assert build({"a": [1, {"b": 2}]}) == {"a": [1, {"b": 2}]}
    made = build({"_target_": "asa.data.preprocessing.settings.PrepareSettings", "margin": 3})
    assert made == PrepareSettings(margin=3)
    outside = ("os.system", "subprocess.run", "asa.config.importlib.import_module", "asa.modelsx.y", "builtins.eval")
    inside = (
        "asa.data.io.files.write_json",
        "asa.config.compose",
        "asa.models.unet.UnetrUpBlock",
        "asa.models.unet.math",
        "asa.data.phantom.cohort.make_cohort",
        "asa.data.phantom.reader.make_cohort",  # imported there, beside the reader
    )
    for target in (*outside, *inside):
        with pytest.raises(ValueError, match="_target_"):
            build({"_target_": target})
    with pytest.raises(ValueError, match="does not exist"):
        build({"_target_": "asa.models.masked_autoencoder.asa_huge"})
    with pytest.raises(ValueError, match="unexpected keyword argument 'depht': leave it out, .* by ~model.depht"):
        build({"_target_": "asa.models.masked_autoencoder.asa_tiny", "depht": 3})
    assert build({"_target_": "collections.Counter"}, plugins=["collections"]) == {}


def test_typed_settings_refuse_unknown_keys_and_wrong_types() -> None:
    with pytest.raises(ValueError, match="stepz"):
        typed(TrainSettings, {"stepz": 1})
    with pytest.raises(ValueError, match="many"):
        typed(TrainSettings, {"steps": "many"})


def test_every_typed_setting_has_a_help_text_and_the_default_of_its_class() -> None:
    for cls in {cls for settings in SETTINGS.values() for cls in settings.values()}:
        assert [field.name for field in dataclasses.fields(cls) if not field.metadata["help"]] == []
    for command, settings in SETTINGS.items():
        own = yaml.safe_load((CONFIG_DIR / f"{command}.yaml").read_text())
        shown = {key.name: key.default for section in sections(command) for key in section.keys}
        for group, cls in settings.items():
            for name, default in (dataclasses.asdict(cls()) | own.get(group, {})).items():
                value = yaml.safe_load(shown[f"{group}.{name}"])
                assert (value if default is None else type(default)(value)) == default


def test_a_number_that_is_given_as_text_is_named_with_its_key_in_every_group_of_settings() -> None:
    for groups in SETTINGS.values():
        for group, cls in groups.items():
            for name in (key for key, value in dataclasses.asdict(cls()).items() if isinstance(value, int | float)):
                with pytest.raises(ValueError, match=rf"^{group}\.{name}=abc: give (a|true)"):
                    typed(cls, {name: "abc"}, group)
    for name, default in dataclasses.asdict(PrepareSettings()).items():
        if isinstance(default, int) or name in ("spacing", "window"):
            with pytest.raises(ValueError, match=rf"^prepare\.{name}='?abc'?: "):
                PrepareSettings(**{name: "abc"})


def test_a_list_is_not_shared_by_two_settings() -> None:
    OptimSettings().betas[0] = 0.5
    assert OptimSettings().betas == [0.9, 0.95]


def test_a_command_offers_what_it_can_run() -> None:
    for command in ("prepare", "pretrain", "finetune", "ablate"):
        assert choices(command, "experiment") == sorted(name for name, of in EXPERIMENTS.items() if of == command)
    for command, methods in METHODS.items():
        offered = choices(command, "model")
        assert {name.rpartition("_")[0] for name in offered} == {name for names in methods.values() for name in names}
        for method, families in methods.items():
            for family in families:
                config = composed(command, f"method={method}", f"model={family}_tiny")
                task = located(config["method"]["_target_"]).task
                assert find_task(task).command == command
    assert "asa_tiny" not in choices("finetune", "model") and "ibsr" not in choices("pretrain", "experiment")
    assert sorted(path.stem for path in (CONFIG_DIR / "method").glob("*.yaml")) == sorted(
        method for methods in METHODS.values() for method in methods
    )


def test_a_model_that_the_method_does_not_train_is_refused_with_those_that_it_does() -> None:
    with pytest.raises(
        ValueError, match=r"^model=asa_tiny is not for asa-finetune .*: choose unet_tiny or vit_seg_tiny"
    ):
        composed("finetune", "model=asa_tiny")
    with pytest.raises(ValueError, match="choose rat_base"):
        composed("finetune", "method=restore", "model=unet_base")
    with pytest.raises(ValueError, match="choose sa_swin_small$"):
        composed("pretrain", "method=sa_swin")


@pytest.mark.parametrize(
    "text", ["C:\\data\\scans", "D:\\my scans\\", "\\\\server\\share\\", "a\\'b", "sub-(\\d+)\\\\", "'"]
)
def test_backslashes_and_quotes_of_a_value_are_kept(text: str) -> None:
    assert compose("phantom", as_overrides("phantom", {"out": text}))["out"] == text
