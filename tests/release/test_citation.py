"""CITATION.cff is of this version, and cites the paper. `make lint` checks it against the schema of its format."""

import datetime
import tomllib
from pathlib import Path

import yaml

import torchrec_qr

ROOT = Path(__file__).parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_project_is_that_of_its_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert CITATION["version"] == torchrec_qr.__version__
    assert CITATION["authors"] == project["authors"]
    assert CITATION["license"] == project["license"]
    assert CITATION["abstract"] == project["description"]
    assert CITATION["keywords"] == project["keywords"]


def test_the_date_is_that_of_the_changelog() -> None:
    date = datetime.date.fromisoformat(CITATION["date-released"])
    assert f"\n## [{CITATION['version']}] - {date}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_paper_is_cited() -> None:
    (paper,) = CITATION["references"]
    assert paper["title"].startswith("Compositional Embeddings Using Complementary Partitions")
    assert [author["family-names"] for author in paper["authors"]] == ["Shi", "Mudigere", "Naumov", "Yang"]
    assert (paper["year"], paper["doi"]) == (2020, "10.1145/3394486.3403059")
    assert paper["identifiers"][0]["value"] == "arXiv:1909.02107"
