"""Losses: modules with flat keyword arguments."""
