"""The README's first example: a diff from TorchRec's collection to ours."""

import re
from pathlib import Path
from typing import Literal

from tests.diff_sides import one_side

README = Path(__file__).parent.parent / "README.md"


def example(side: Literal["-", "+"]) -> str:
    """Returns the program before the change ("-") or after it ("+")."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    return one_side(diff, side)
