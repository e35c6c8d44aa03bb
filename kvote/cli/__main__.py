"""``python -m kvote.cli`` is ``kvote``."""

import sys

from kvote.cli import main

sys.exit(main())
