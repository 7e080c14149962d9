"""Run the command line as `python -m vitmodel`."""

import sys

from vitmodel.cli import main

sys.exit(main())
