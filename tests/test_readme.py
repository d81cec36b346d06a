"""The README's example runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"<!-- A test runs this example. -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str) -> None:
    exec(compile(example, str(README), "exec"), {})


def test_there_is_an_example_of_about_twenty_lines() -> None:
    assert len(EXAMPLES) == 1
    assert 10 <= len([line for line in EXAMPLES[0].splitlines() if line]) <= 25
