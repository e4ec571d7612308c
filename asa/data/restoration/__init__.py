"""Pairs of 2-D images, their region maps, and simulated degradations."""
