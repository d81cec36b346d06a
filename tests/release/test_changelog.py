"""The changelog begins with this version, and what it names is there."""

import re
from importlib import import_module, util
from pathlib import Path

import torchrec_qr
import torchrec_qr.distributed
import torchrec_qr.distributed.async_checkpoint
import torchrec_qr.distributed.checkpoint
import torchrec_qr.inference
import torchrec_qr.planner
from torchrec_qr.cli.stack_advice import TESTED

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CHANGELOG.md").read_text()
FIRST = TEXT.split("\n## [0.1.0]")[1].split("\n## ")[0]
PUBLIC = [
    torchrec_qr,
    torchrec_qr.distributed.async_checkpoint,
    torchrec_qr.distributed.checkpoint,
    torchrec_qr.distributed,
    torchrec_qr.inference,
    torchrec_qr.planner,
]
# These stand in backticks and are no names of the library: arguments, values, commands and parts of others.
OTHERS = {
    *("mult", "add", "concat", "path", "DTensor", "NotImplementedError", "DistributedModelParallel", "torch.export"),
    *('id_hash="splitmix64"', "requires_grad_(False)", "fit=True", "row_wise", "--fit"),
}


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_it_begins_with_this_version() -> None:
    releases = re.findall(r"^## \[(.+?)\]", TEXT, re.MULTILINE)
    assert releases[-1] == "0.1.0"
    assert torchrec_qr.__version__ in releases[:2]
    assert releases[0] in (torchrec_qr.__version__, "Unreleased")


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https:)([^)#]*)(?:#([^)]+))?\)", TEXT)
    assert len(links) > 15
    for path, anchor in links:
        target = ROOT / (path or "CHANGELOG.md")
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


def test_its_names_are_there() -> None:
    """Each name in backticks is public, a module that runs, a target of make, or known to be another's."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in set(re.findall(r"`([^`]+)`", FIRST)) - OTHERS:
        kind, _, rest = name.rpartition(" ")
        if kind == "make":
            assert rest in targets, name
        elif kind == "python -m":
            assert util.find_spec(rest) is not None, name
        elif kind == "torchrec-qr":
            assert rest in ("doctor", "plan")
        elif name.startswith("torchrec_qr."):
            module, _, attribute = name.rpartition(".")
            assert hasattr(import_module(module), attribute), name
        else:
            assert any(hasattr(module, name) for module in PUBLIC), name


def test_its_versions_are_those_that_are_tested() -> None:
    minors = [" / ".join(v.rpartition(".")[0] for v in (t.torch, t.fbgemm, t.torchrec)) for t in TESTED]
    assert f"{minors[0]}, {minors[1]} and {minors[2]}" in FIRST


def test_a_first_release_changes_and_fixes_nothing() -> None:
    headings = re.findall(r"^### (.*)$", FIRST, re.MULTILINE)
    assert {"Known limits", "Versions", "Not tested"} <= set(headings)
    assert {"Changed", "Fixed", "Deprecated", "Removed"}.isdisjoint(headings)
    assert FIRST.count("\n") <= 90
