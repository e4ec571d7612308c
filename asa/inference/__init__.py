"""Trained networks on whole scans, with results in each scan's own space."""
