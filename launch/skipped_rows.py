"""Malformed rows that a pass over a split leaves out: counted over all ranks, and reported."""

from collections.abc import Callable

import torch.distributed as dist

from launch.data.errors import BadRows
from launch.data.split import Split


class SkippedRows:
    """Counts of each split's latest pass. All ranks must make the same calls.

    Args:
        say (Callable[[str], None]): prints a line.
        group (ProcessGroup): of all ranks, on the hosts.

    Attributes:
        of_split (dict[str, int]): rows left out, by the split's name; empty under ``on_bad_row: error``.
    """

    def __init__(self, say: Callable[[str], None], group: dist.ProcessGroup) -> None:
        self._say, self._group = say, group
        self.of_split: dict[str, int] = {}

    def count(self, split: Split, bad_rows: BadRows, number: int, before: int = 0) -> dict[str, int]:
        """Returns ``{"skipped_rows": n}``, n being how many rows of a pass all ranks have left out so far.

        It returns nothing if malformed rows are errors. The first row that is left out is printed once a split.

        Args:
            split (Split): that is read.
            bad_rows (BadRows): of this rank.
            number (int): how many of them count by now; a rank reads ahead.
            before (int): of all ranks, before this process went on with the pass.
        """
        if bad_rows.policy == "error":
            return {}
        of_ranks: list[tuple[int, str | None]] = [(0, None)] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (number, bad_rows.first), group=self._group)
        number = sum(n for n, _ in of_ranks)
        if number and not self.of_split.get(split.name):
            first = next((first for _, first in of_ranks if first is not None), None)
            self._say(f"malformed rows of the {split.name} split are left out, the first is {first}")
        self.of_split[split.name] = before + number
        return {"skipped_rows": before + number}
