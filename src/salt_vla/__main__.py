"""`python -m salt_vla`, which torchrun can start as several processes."""

import sys

from salt_vla.cli import main

sys.exit(main())
