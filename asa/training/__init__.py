"""The training loop with its optimizers, checkpoints, ranks and logs, and the cost of a run."""
