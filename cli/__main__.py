"""`python -m bard_vl_cli` is `bard-vl`."""

import sys

from .main import main

sys.exit(main())
