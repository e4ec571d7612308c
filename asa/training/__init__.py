"""The training loop, and what keeps a run going: optimizers, checkpoints, ranks, logs, the cost of a run."""
