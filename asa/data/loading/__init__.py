"""Prepared volumes to training batches."""
