"""Errors that a GPU reports steps later end the job before anything is saved or reported of the steps in between.

A CPU has no such errors: the tests put checks into the queue, like those of a GPU that have not arrived yet.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.data.loader import Data
from launch.task import TrainTask
from tests.launch.jobs import SMALL, refused, with_set
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


def test_no_checkpoint_has_them(tmp_path: Path) -> None:
    fail = partial(fail_in_forward, who=1, number=3)
    _, text = refused(tmp_path, *with_set(*SMALL, "train.checkpoint_every=2", "train.max_steps=6"), prepare=fail)
    assert f"IndexError: {TEXT}" in text
    folder = tmp_path / "demo" / "checkpoints"
    assert {p.name for p in folder.glob("step_*")} == {"step_2"}
    assert (folder / "step_2" / "whole.json").exists()


@pytest.mark.parametrize(
    ("setting", "fail", "splits"),
    [
        ("train.eval_every=4", partial(fail_in_forward, who=0, number=3), ["train", "train"]),
        ("train.max_steps=4", partial(fail_in_forward, who=0, number=4), ["train", "train"]),
        ("train.max_steps=2", fail_in_test, ["train", "validation"]),
    ],
    ids=["before a validation", "in the last step", "in the test pass"],
)
def test_no_evaluation_is_reported_with_them(
    tmp_path: Path, setting: str, fail: Callable[[int], None], splits: list[str]
) -> None:
    (text,) = refused(tmp_path, *with_set(*SMALL, setting), world_size=1, prepare=fail)
    assert f"IndexError: {TEXT}" in text
    assert [line["split"] for line in metrics(tmp_path / "demo")] == splits
    assert (tmp_path / "demo" / "best").exists() == ("validation" in splits)
