"""A job reports an error in a line for a person, in a file for torchelastic, and on demand with a traceback."""

import json
import os
from functools import partial
from pathlib import Path

import pytest

from tests.launch.jobs import SMALL, start, with_set

MISSING = with_set(*SMALL, "data.format=criteo_tsv", "data.files=[/nowhere/*.tsv]", "data.ids=modulo")


def name_error_file(folder: Path, rank: int) -> None:
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error_{rank}.json")


def test_an_error_is_one_line_and_torchelastic_has_the_rest(tmp_path: Path) -> None:
    ranks = start(tmp_path, *MISSING, prepare=partial(name_error_file, tmp_path))
    assert ranks.exit_codes() == [1, 1]
    for rank, output in enumerate(ranks.outputs):
        (line,) = (line for line in output.read_text().splitlines() if "Error" in line)
        assert "/nowhere/*.tsv" in line
        assert "Traceback" not in output.read_text()
        message = json.loads((tmp_path / f"error_{rank}.json").read_text())["message"]
        assert message["message"] == line
        assert "in open_data" in message["extraInfo"]["py_callstack"]


def test_a_traceback_is_shown_on_demand(tmp_path: Path) -> None:
    ranks = start(tmp_path, *MISSING, "--traceback", world_size=1)
    assert ranks.exit_codes() == [1]
    assert "Traceback (most recent call last)" in ranks.text()
    assert "in open_data" in ranks.text()


def fail_by_key(rank: int) -> None:
    import launch.train

    launch.train.open_data = lambda *_: {}["lost"]


def test_an_error_that_is_not_the_projects_says_how_to_see_more(tmp_path: Path) -> None:
    ranks = start(tmp_path, *with_set(*SMALL), world_size=1, prepare=fail_by_key)
    assert ranks.exit_codes() == [1]
    assert "KeyError: 'lost' (--traceback shows where)\n" in ranks.text()


@pytest.mark.parametrize(("size", "name"), [(500, "demo"), (2000, "demo/meaning.json"), (3000, "demo/config.yaml")])
def test_a_full_disk_is_one_line_that_names_the_file(size: int, name: str, tmp_path: Path) -> None:
    # Print little: the output is a file as well, in which the table of tables would leave no room for the error.
    ranks = start(tmp_path, *with_set(*SMALL), "--quiet", max_file_bytes=size)
    assert ranks.exit_codes() == [1, 1]
    assert f"RunFolderError: {tmp_path / name}: cannot be written: File too large\n" in ranks.outputs[0].read_text()
    assert "Traceback" not in ranks.text()
    assert not list((tmp_path / "demo").glob("lock.*")) or size > 1024
