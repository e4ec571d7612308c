"""Tasks: what each does with data, what it minimises, how it is validated, and how it predicts."""
