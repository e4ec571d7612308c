"""Networks: modules with flat keyword arguments that never see a configuration."""
