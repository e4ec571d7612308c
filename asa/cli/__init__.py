"""The commands. Each composes a configuration and calls a task."""

import os

# PyTorch's threads wait for each other by spinning: beside other busy processes a step took three times as long.
# libgomp reads this when torch is loaded, so it is set before any command imports it; a value that is given stays.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
