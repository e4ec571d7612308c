"""The commands. Each composes a configuration and calls a task."""
