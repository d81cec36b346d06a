"""Every public name is documented with an example, and every example of the project is right."""

import doctest
import importlib
from pathlib import Path

import pytest

import torchrec_qr

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
ROOT = Path(torchrec_qr.__file__).parents[1]
# Found by file, not by import, so that a module that cannot be imported fails its own test alone.
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("torchrec_qr", "launch", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
    if package == "torchrec_qr" or ">>>" in path.read_text()
)
# Users import from these.
PUBLIC = {
    *("torchrec_qr", "torchrec_qr.distributed", "torchrec_qr.planner", "torchrec_qr.inference", "torchrec_qr.quant"),
    "torchrec_qr.cli.schema",
}


@pytest.mark.parametrize("module", [module for module in MODULES if module in PUBLIC])
def test_public_names_have_examples(module: str) -> None:
    public = importlib.import_module(module)
    parser = doctest.DocTestParser()
    assert [name for name in public.__all__ if not parser.get_examples(getattr(public, name).__doc__ or "")] == []


@pytest.mark.parametrize("module", MODULES)
def test_examples_are_right(module: str) -> None:
    if "triton" in module:
        pytest.importorskip("triton", reason="Triton is not installed")
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=FLAGS)
    assert failed == 0, "see the captured output"
