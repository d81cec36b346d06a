"""These tests share helpers with those of real ranks, in `tests/distributed`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "distributed")]
