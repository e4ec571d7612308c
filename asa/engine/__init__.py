"""Training, checkpoints, prediction and evaluation."""
