"""`python -m asa COMMAND ...`, for torchrun."""

import sys

from asa.cli import main

sys.exit(main())
