"""The checks of fault drills find what is wrong with a run that is not as it must be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.drill_checks import Undisturbed, faults_of_a_complete_run, last_deals, lines_of
from tests.launch.jobs import SMALL, run, with_set


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended")
    run(folder, *with_set(*SMALL, "train.checkpoint_every=6"))
    return folder / "demo"


@pytest.mark.slow
def test_a_run_that_was_not_disturbed_is_as_it_must_be(ended: Path) -> None:
    lines = lines_of(ended)
    undisturbed = Undisturbed(2, 0, lines, {0: lines[-1]["auc"]})
    assert last_deals(ended) == ([(2, 11)], True)
    assert faults_of_a_complete_run(ended, undisturbed) == []

    assert faults_of_a_complete_run(ended, replace(undisturbed, lines=[*lines[:-1], {"step": 11}])) == [
        "as many ranks as before, and metrics differ, first at step 11"
    ]
    # On other ranks all along, as after a fault before the first checkpoint.
    assert faults_of_a_complete_run(ended, replace(undisturbed, ranks=3, lines=[])) == []
    (auc,) = faults_of_a_complete_run(ended, replace(undisturbed, auc={0: 0.9, 1: 0.95}))
    assert auc.endswith("is not within 0.9000 and 0.9500, the spread of seeds")

    whole = ended / "checkpoints" / "step_11" / "whole.json"
    saved = json.loads(whole.read_text())
    whole.write_text(json.dumps(saved | {"ended": None}))  # the sums are then those of an epoch with no row
    assert faults_of_a_complete_run(ended, undisturbed) == ["not each row of the epoch was trained once"]
    whole.write_text(json.dumps(saved))

    data = next((ended / "checkpoints" / "step_6" / "state").glob("*.distcp"))
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    (broken,) = faults_of_a_complete_run(ended, undisturbed)
    assert broken.startswith("checkpoints/step_6: ")
