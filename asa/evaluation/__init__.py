"""Metrics, policies and statistics, on arrays and tables."""
