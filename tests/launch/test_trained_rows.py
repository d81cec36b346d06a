"""Malformed rows that were trained are counted once for each batch, since ranks wait for one another there."""

from launch.data.errors import BadRows
from launch.data.generator import GeneratedRows
from launch.data.loader import Batches
from launch.data.source import RowSource
from launch.data.split import Split
from launch.sections import GeneratorSection
from launch.skipped_rows import SkippedRows, TrainedRows


class Counted(SkippedRows):
    """Counts the rows of this rank alone, and how often all ranks would have met."""

    def __init__(self) -> None:
        self.meetings = 0

    def count(self, split: Split, bad_rows: BadRows, number: int, before: int = 0) -> dict[str, int]:
        self.meetings += 1
        return {"skipped_rows": before + number}


def test_a_checkpoint_after_a_line_of_the_log_counts_no_second_time() -> None:
    split = Split("train", RowSource([GeneratedRows(GeneratorSection(rows=64), [10], 1)]), 0, 64)
    counted = Counted()
    rows = TrainedRows(split, counted, "skip")
    batches = Batches(lambda: iter(()), 1)
    batches.bad_rows, batches.malformed = BadRows("skip"), [1, 0, 2, 4]
    rows.load({"skipped_rows": 5, "has_good_rows": True})
    rows.start(2, batches)

    assert rows.count(5) == {"skipped_rows": 5 + 1 + 0 + 2}
    assert rows.state(5) == {"skipped_rows": 8, "has_good_rows": True}
    assert counted.meetings == 1
    assert rows.state(6) == {"skipped_rows": 12, "has_good_rows": True}
    assert rows.state(0)["skipped_rows"] == 0  # of an epoch that has not begun
    assert counted.meetings == 2
