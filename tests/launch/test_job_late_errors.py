"""Errors that a GPU reports steps later end the job before anything is saved or reported of the steps in between.

A CPU has no such errors: the tests put checks into the queue, like those of a GPU that have not arrived yet.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from launch.data.loader import Data
from launch.task import TrainTask
from tests.launch.jobs import SMALL, start, with_set
from tests.run_metrics import metrics
from torchrec_qr import late_errors

TEXT = "table 't_cat_3': id 7777 is out of range"


class _NotSeenYet:
    """Word of it comes only to who waits."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


def _failed() -> None:
    raise IndexError(TEXT)


def fail_in_forward(rank: int, who: int, number: int) -> None:
    """Rank ``who`` meets an error in its call ``number``, from 1, of the model."""
    forward, calls = TrainTask.forward, 0

    def counted(self: TrainTask, batch: Any) -> Any:
        nonlocal calls
        calls += not isinstance(batch, torch.fx.Proxy)
        if calls == number and rank == who:
            late_errors._late.add(_failed, _NotSeenYet())
        return forward(self, batch)

    TrainTask.forward = counted  # type: ignore[method-assign]


def fail_in_test(rank: int) -> None:
    """The error comes of a batch of the test split."""
    test = Data.test

    def failing(self: Data) -> Any:
        late_errors._late.add(_failed, _NotSeenYet())
        return test(self)

    Data.test = failing  # type: ignore[method-assign]


def splits(folder: Path) -> list[str]:
    return [line["split"] for line in metrics(folder / "demo")] if (folder / "demo" / "metrics.jsonl").exists() else []


def test_no_checkpoint_has_them(tmp_path: Path) -> None:
    fail = partial(fail_in_forward, who=1, number=3)
    ranks = start(tmp_path, *with_set(*SMALL, "train.checkpoint_every=2", "train.max_steps=6"), prepare=fail)
    assert ranks.exit_codes(timeout=60) == [1, 1]
    assert f"IndexError: {TEXT}" in ranks.outputs[1].read_text()
    folder = tmp_path / "demo" / "checkpoints"
    assert {p.name for p in folder.glob("step_*")} == {"step_2"}
    assert (folder / "step_2" / "whole.json").exists()


def test_no_validation_is_reported_with_them(tmp_path: Path) -> None:
    fail = partial(fail_in_forward, who=0, number=3)
    ranks = start(tmp_path, *with_set(*SMALL, "train.eval_every=4"), world_size=1, prepare=fail)
    assert ranks.exit_codes(timeout=60) == [1]
    assert f"IndexError: {TEXT}" in ranks.text()
    assert splits(tmp_path) == ["train", "train"]
    assert not (tmp_path / "demo" / "best").exists()


def test_the_last_step_of_training_is_not_left_out(tmp_path: Path) -> None:
    fail = partial(fail_in_forward, who=0, number=4)
    ranks = start(tmp_path, *with_set(*SMALL, "train.max_steps=4"), world_size=1, prepare=fail)
    assert ranks.exit_codes(timeout=60) == [1]
    assert f"IndexError: {TEXT}" in ranks.text()
    assert splits(tmp_path) == ["train", "train"]


def test_nor_is_the_test_pass(tmp_path: Path) -> None:
    ranks = start(tmp_path, *with_set(*SMALL, "train.max_steps=2"), world_size=1, prepare=fail_in_test)
    assert ranks.exit_codes(timeout=60) == [1]
    assert f"IndexError: {TEXT}" in ranks.text()
    assert splits(tmp_path) == ["train", "validation"]
