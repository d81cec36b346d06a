"""A job reports an error in a line for a person, in a file for torchelastic, and on demand with a traceback."""

import json
import os
from functools import partial
from pathlib import Path

import pytest

from tests.launch.jobs import SMALL, refused, with_set

MISSING = with_set(*SMALL, "data.format=criteo_tsv", "data.files=[/nowhere/*.tsv]", "data.ids=modulo")


def name_error_file(folder: Path, rank: int) -> None:
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error_{rank}.json")


def test_an_error_is_one_line_and_torchelastic_has_the_rest(tmp_path: Path) -> None:
    for rank, text in enumerate(refused(tmp_path, *MISSING, prepare=partial(name_error_file, tmp_path))):
        (line,) = (line for line in text.splitlines() if "Error" in line)
        assert "/nowhere/*.tsv" in line
        message = json.loads((tmp_path / f"error_{rank}.json").read_text())["message"]
        assert message["message"] == line
        assert "in open_splits" in message["extraInfo"]["py_callstack"]


def test_a_traceback_is_shown_on_demand(tmp_path: Path) -> None:
    (text,) = refused(tmp_path, *MISSING, "--traceback", world_size=1)
    assert "Traceback (most recent call last)" in text
    assert "in open_splits" in text


def fail_by_key(rank: int) -> None:
    import launch.train

    launch.train.open_splits = lambda *_: {}["lost"]


def test_an_error_that_is_not_the_projects_says_how_to_see_more(tmp_path: Path) -> None:
    (text,) = refused(tmp_path, *with_set(*SMALL), world_size=1, prepare=fail_by_key)
    assert "KeyError: 'lost' (--traceback shows where)\n" in text


@pytest.mark.parametrize(("size", "name"), [(500, "demo"), (2000, "demo/meaning.json"), (3000, "demo/config.yaml")])
def test_a_full_disk_is_one_line_that_names_the_file(size: int, name: str, tmp_path: Path) -> None:
    # Print little: the output is a file as well, in which the table of tables would leave no room for the error.
    text, _ = refused(tmp_path, *with_set(*SMALL), "--quiet", max_file_bytes=size)
    assert f"RunFolderError: {tmp_path / name}: cannot be written: File too large\n" in text
    assert not list((tmp_path / "demo").glob("lock.*")) or size > 1024
