"""Functions on tensors: no parameters, no files, no configuration."""
