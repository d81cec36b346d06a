"""Malformed rows that a pass over a split leaves out: counted over all ranks, and told."""

from collections.abc import Callable

import torch.distributed as dist

from launch.data.errors import BadRows, DataError
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

    def count(self, split: Split, bad_rows: BadRows) -> dict[str, int]:
        """Returns ``{"skipped_rows": n}``, n being how many rows of a pass all ranks have left out so far.

        It returns nothing where malformed rows are errors. The first row that is left out is told once a split.
        """
        if bad_rows.policy == "error":
            return {}
        told: list[tuple[int, str | None]] = [(0, None)] * dist.get_world_size()
        dist.all_gather_object(told, (bad_rows.count, bad_rows.first), group=self._group)
        number = sum(n for n, _ in told)
        if number and not self.of_split.get(split.name):
            first = next(first for _, first in told if first is not None)
            self._say(f"malformed rows of the {split.name} split are left out, the first is {first}")
        self.of_split[split.name] = number
        return {"skipped_rows": number}

    def require_good_rows(self, split: Split, good: int, bad_rows: BadRows) -> None:
        """Checks that a pass had a row that counts.

        Args:
            split (Split): that was read.
            good (int): rows of all ranks that counted.
            bad_rows (BadRows): of this rank.

        Raises:
            DataError: on every rank; there was none.
        """
        if good == 0:
            self.count(split, bad_rows)
            first = f", the first: {bad_rows.first}" if bad_rows.first else ""
            raise DataError(f"the {split.name} split", f"no row that was read is good{first}")
