"""What these tests share with those of real ranks lies in `tests/distributed`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "distributed")]
