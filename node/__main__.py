"""``python -m petalnode``."""

import sys

from petalnode.cli.main import main

sys.exit(main())
