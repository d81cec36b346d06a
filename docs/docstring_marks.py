"""Makes docstrings reStructuredText: a bar in a formula, such as |P_j|, is a bar there and no substitution."""

import re
from typing import Any

_LITERAL_OR_BAR = re.compile(r"``.*?``|\|")


def escape_bars(lines: list[str]) -> None:
    """Escapes bars in place, except in literals and in examples, which end at a blank line."""
    in_example = False
    for number, line in enumerate(lines):
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith(">>>"))
        if not in_example:
            lines[number] = _LITERAL_OR_BAR.sub(lambda match: r"\|" if match[0] == "|" else match[0], line)


def setup(app: Any) -> dict[str, bool]:
    """Has autodoc call `escape_bars` for each docstring."""
    app.connect("autodoc-process-docstring", lambda app, what, name, object_, options, lines: escape_bars(lines))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
