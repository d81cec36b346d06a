"""The README's first example: a diff from TorchRec's collection to ours."""

import re
from pathlib import Path
from typing import Literal

README = Path(__file__).parent.parent / "README.md"


def example(side: Literal["-", "+"]) -> str:
    """Returns the program before the change ("-") or after it ("+")."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    return "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True) if line[0] in (" ", side, "\n"))
