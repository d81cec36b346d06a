"""Digits give the rows of ids, and blocks of a grid are the ids in order."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import COPRIME, RADIX, kind_of

from torchrec_qr import ChineseRemainder, HashPartition, MixedRadix, QuotientRemainder
from torchrec_qr.inference.id_digits import Digit, digits_of, id_grid, number_of_lower
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


@settings(max_examples=150, deadline=None)
@given(with_digits(), st.integers(0, 3), st.integers(1, 300))
def test_blocks_have_the_rows_of_their_ids(of: tuple[PartitionSpec, int], num_lower: int, most_rows: int) -> None:
    spec, num_ids = of
    digits = digits_of(layout_of(spec, num_ids), num_ids)
    assert digits is not None
    grid = id_grid(digits, min(num_lower, len(digits) - 1), most_rows)
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
        assert len(ids) - block.first <= most_rows * grid.period
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
    for size, most_rows, num_rows in ((130, 126, 65), (250_000, 16_384, 15_625), (4, 10, 4), (7, 1, 1)):
        assert id_grid([Digit(0, size)], 0, most_rows).num_rows == num_rows


def test_the_lower_digits_are_those_with_few_combinations() -> None:
    digits = [Digit(j, size) for j, size in enumerate(RADIX[4])]  # 4, 3, 3, 3
    for most, most_of_several, count in ((3, 100, 0), (4, 11, 1), (4, 12, 2), (100, 36, 3), (1000, 1000, 3)):
        assert number_of_lower(digits, most, most_of_several) == count
