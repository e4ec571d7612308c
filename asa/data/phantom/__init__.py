"""The phantom cohort: synthetic brains with a real anatomy."""
