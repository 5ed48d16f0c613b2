"""`python -m loku`."""

import sys

from loku.cli import main

sys.exit(main())
