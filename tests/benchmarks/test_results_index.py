"""The index of the result files: each is listed, and each that is listed is there."""

import re

from benchmarks.pictures import RESULTS

LINK = re.compile(r"\]\(([^)#]+)")


def test_the_index_lists_every_result_once_and_nothing_else() -> None:
    listed = LINK.findall((RESULTS / "README.md").read_text())
    here = [name for name in listed if not name.startswith("../")]
    there = [file.name for suffix in ("json", "md", "svg") for file in RESULTS.glob(f"*.{suffix}")]
    assert sorted([*here, "README.md"]) == sorted(there)


def test_links_out_of_the_index_lead_to_pages() -> None:
    listed = LINK.findall((RESULTS / "README.md").read_text())
    assert all((RESULTS / name).exists() for name in listed if name.startswith("../"))
