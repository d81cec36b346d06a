"""The site has every page of docs/ and, in its reference, every public name."""

import re
from importlib import import_module

import pytest
from fenced_blocks import DOCS

INDEX = DOCS / "index.md"
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REFERENCE = DOCS / "reference"
PUBLIC = (
    *("torchrec_qr", "torchrec_qr.distributed", "torchrec_qr.planner", "torchrec_qr.inference", "torchrec_qr.quant"),
    "torchrec_qr.cli.schema",
)


def entries() -> list[str]:
    """Returns the pages that the first page's toctrees name, relative to docs/."""
    lines = [line for tree in TOCTREE.findall(INDEX.read_text()) for line in tree.splitlines()]
    return [re.sub(r".*<(.*)>$", r"\1", line) for line in lines if line and not line.startswith(":")]


def documented(module: str) -> set[str]:
    """Returns the names that the reference documents under a module, by their full names or after currentmodule."""
    names = set()
    for page in REFERENCE.glob("*.rst"):
        current = ""
        for directive, argument in re.findall(r"^\.\. (\w+):: (\S+)$", page.read_text(), re.MULTILINE):
            if directive in ("currentmodule", "automodule"):
                current = argument
            elif directive.startswith("auto"):
                names.add(argument if argument.startswith("torchrec_qr.") else f"{current}.{argument}")
    return {name.removeprefix(f"{module}.") for name in names if name.startswith(f"{module}.")}


def test_every_page_is_in_a_toctree() -> None:
    pages = [path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")]
    pages += [path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.rst")]
    listed = entries()
    assert len(listed) == len(set(listed))
    assert set(pages) - {"index"} == {entry for entry in listed if not entry.startswith("../")}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    public = set(import_module(module).__all__)
    assert public - documented(module) == set()
    assert {name for name in documented(module) if "." not in name} - public == set()
