"""Import this first to use what the tests use: their harness for forked ranks, and their counters."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
