"""Digits give the rows of ids, and blocks of a grid are the ids in order."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import COPRIME, RADIX, kind_of

from torchrec_qr import ChineseRemainder, HashPartition, MixedRadix, QuotientRemainder
from torchrec_qr.inference.id_digits import digits_of, id_grid
from torchrec_qr.ops.description import TableLayout
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.partitions import PartitionSpec


def layout_of(spec: PartitionSpec, num_ids: int) -> TableLayout:
    bound = spec.bind(num_ids)
    return TableLayout("add", partition_layouts(bound, dict.fromkeys(range(bound.num_partitions), 4)))


def with_digits() -> st.SearchStrategy[tuple[PartitionSpec, int]]:
    """Specs whose rows are digits of ids, with S."""

    def radix(sizes: list[int]) -> st.SearchStrategy[tuple[PartitionSpec, int]]:
        product = math.prod(sizes)
        return st.integers(1, product).map(lambda num_ids: (MixedRadix(sizes=sizes), num_ids))

    def remainder(num_ids: int) -> st.SearchStrategy[tuple[PartitionSpec, int]]:
        grouping: Any = st.sampled_from(["strided", "adjacent"])
        return st.builds(
            lambda m, of: (QuotientRemainder(num_collisions=m, grouping=of), num_ids), st.integers(1, num_ids), grouping
        )

    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    return st.one_of(sizes.flatmap(radix), st.integers(1, 200).flatmap(remainder))


@settings(max_examples=300, deadline=None)
@given(with_digits(), st.integers(1, 300))
def test_blocks_have_the_rows_of_their_ids(of: tuple[PartitionSpec, int], most: int) -> None:
    spec, num_ids = of
    digits = digits_of(layout_of(spec, num_ids), num_ids)
    assert digits is not None
    grid = id_grid(digits, most)
    ids: list[int] = []
    rows: list[dict[int, int]] = []
    for block in grid.blocks():
        assert block.first == len(ids)
        of_upper = {digit.partition: value for digit, value in zip(grid.upper, block.upper, strict=True)}
        for row in range(block.rows.start, block.rows.stop):
            for place in range(grid.period):
                of_lower, rest = {}, place
                for digit in grid.lower:
                    rest, of_lower[digit.partition] = divmod(rest, digit.size)
                ids.append(len(ids))
                rows.append(of_upper | {grid.split.partition: row} | of_lower)
        assert len(ids) - block.first <= max(most, grid.period)
    expected = spec.bind(num_ids).rows(torch.arange(num_ids))
    assert len(ids) >= num_ids
    assert [[of[j] for j in range(expected.shape[1])] for of in rows[:num_ids]] == expected.tolist()


@pytest.mark.parametrize(
    ("spec", "num_ids"),
    [
        *((ChineseRemainder(sizes=COPRIME[k]), 100) for k in (2, 3, 4)),
        (HashPartition(rows=17), 100),
        (kind_of("explicit", 2).partitions, 100),
    ],
)
def test_rows_that_are_no_digits(spec: PartitionSpec, num_ids: int) -> None:
    assert digits_of(layout_of(spec, num_ids), num_ids) is None


def test_blocks_are_nearly_equal() -> None:
    for sizes, most, period, num_rows in (
        (RADIX[3], 60, 30, 2),
        ([130, 130, 60], 16_384, 130, 65),
        ([100, 100, 100], 16_384, 10_000, 1),
        ([250_000, 4], 16_384, 1, 15_625),
    ):
        num_ids = math.prod(sizes)
        digits = digits_of(layout_of(MixedRadix(sizes=sizes), num_ids), num_ids)
        assert digits is not None
        grid = id_grid(digits, most)
        assert (grid.period, grid.num_rows) == (period, num_rows), sizes
