"""``python -m vitprune`` is the command line."""

import sys

from vitprune.cli import main

sys.exit(main())
