"""The commands. Each composes a configuration, builds what it names and calls the engine."""
