"""The sizes that `balanced`, `rows` and `compression` choose, against brute force."""

import math
import time
from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_qr.partitions import ChineseRemainder, HashPartition, MixedRadix, PartitionSpec, QuotientRemainder

MAX_BRUTE = 3000
# The least total of K sizes is never above that of two, 2⌈√3000⌉ = 110, with K - 2 <= 2 sizes of 1 beside them; coprime
# pairs near √S may need a little more.
MAX_TOTAL = 130

Searched = type[MixedRadix] | type[ChineseRemainder]


def largest_products(count: int) -> npt.NDArray[np.int64]:
    """products[T] is the largest product of `count` sizes >= 1 that add up to T, 0 if there are none."""
    products = np.zeros(MAX_TOTAL, dtype=np.int64)
    products[0] = 1
    for _ in range(count):
        longer = np.zeros_like(products)
        for total in range(1, MAX_TOTAL):
            longer[total] = max(size * products[total - size] for size in range(1, total + 1))
        products = longer
    return products


def all_sizes(count: int, total: int, cap: int, coprime: bool) -> Iterator[tuple[int, ...]]:
    """All non-increasing (and pairwise coprime) sizes of at most `cap` that add up to at most `total`."""
    if count == 0:
        yield ()
        return
    for size in range(1, min(cap, total - (count - 1)) + 1):
        for rest in all_sizes(count - 1, total - size, size, coprime):
            if not coprime or all(math.gcd(size, other) == 1 for other in rest):
                yield (size, *rest)


def largest_coprime_products(count: int) -> npt.NDArray[np.int64]:
    products = np.zeros(MAX_TOTAL, dtype=np.int64)
    for sizes in all_sizes(count, MAX_TOTAL - 1, MAX_TOTAL, coprime=True):
        total = sum(sizes)
        products[total] = max(products[total], math.prod(sizes))
    return products


@cache
def brute_force_totals(method: Searched, count: int) -> list[int]:
    """The least total for every S up to 3,000, by trying all sizes."""
    products = largest_products(count) if method is MixedRadix else largest_coprime_products(count)
    return [0] + [int(np.flatnonzero(products >= num_ids)[0]) for num_ids in range(1, MAX_BRUTE + 1)]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("method", [MixedRadix, ChineseRemainder])
def test_balanced_has_the_least_total(method: Searched, count: int) -> None:
    expected = brute_force_totals(method, count)
    for num_ids in range(1, MAX_BRUTE + 1):
        partitions = method(balanced=True, num_partitions=count).bind(num_ids)
        assert partitions.num_rows == expected[num_ids], partitions
        assert list(partitions.sizes) == sorted(partitions.sizes, reverse=True)
        assert partitions.num_partitions == count


def test_balanced_quotient_remainder_has_the_least_total() -> None:
    for num_ids in range(1, MAX_BRUTE + 1):
        m = np.arange(1, num_ids + 1)
        main_rows = -(-num_ids // m)
        strided = QuotientRemainder(balanced=True).bind(num_ids)
        assert strided.num_rows == (main_rows + -(-num_ids // main_rows)).min(), num_ids
        adjacent = QuotientRemainder(balanced=True, grouping="adjacent").bind(num_ids)
        assert adjacent.num_rows == (main_rows + m).min(), num_ids
        assert strided.main == adjacent.main == 0
        assert (strided.strides, adjacent.strides) == ((1, strided.sizes[0]), (adjacent.sizes[1], 1))


@pytest.mark.parametrize("grouping", ["strided", "adjacent"])
def test_quotient_remainder_of_a_budget_has_the_fewest_collisions(grouping: str) -> None:
    for num_ids in [*range(1, 60), 100, 127, 210, 211, 400]:
        totals = [
            QuotientRemainder(num_collisions=m, grouping=grouping).bind(num_ids).num_rows for m in range(1, num_ids + 1)
        ]
        for rows in range(1, num_ids + 4):
            fitting = [m for m, total in enumerate(totals, start=1) if total <= rows]
            if fitting:
                found = QuotientRemainder(rows=rows, grouping=grouping).bind(num_ids)
                fewest = QuotientRemainder(num_collisions=fitting[0], grouping=grouping).bind(num_ids)
                assert found == fewest, (num_ids, rows)
            else:
                with pytest.raises(ValueError, match=f"rows must be at least {min(totals)}, .* got {rows}$"):
                    QuotientRemainder(rows=rows, grouping=grouping).bind(num_ids)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("method", [MixedRadix, ChineseRemainder])
def test_a_budget_has_the_largest_main_and_the_least_others(method: Searched, count: int) -> None:
    max_ids = {1: 40, 2: 60, 3: 45, 4: 30}[count]
    tuples = list(all_sizes(count, max_ids + count + 2, max_ids, coprime=method is ChineseRemainder))
    for num_ids in range(1, max_ids + 1):
        # More than S rows of the main partition would lie idle.
        legal = [sizes for sizes in tuples if math.prod(sizes) >= num_ids and sizes[0] <= num_ids]
        least = min(sum(sizes) for sizes in legal)
        best: dict[int, tuple[int, int]] = {}
        for sizes in legal:
            total = sum(sizes)
            best[total] = max(best.get(total, (0, 0)), (sizes[0], -total))
        reached = (0, 0)
        for rows in range(least, num_ids + count + 3):
            reached = max(reached, best.get(rows, (0, 0)))
            found = method(rows=rows, num_partitions=count).bind(num_ids)
            assert (found.sizes[0], -found.num_rows) == reached, (num_ids, rows, found)
            assert found.main == 0
            assert found.num_partitions == count
        with pytest.raises(ValueError, match=f"rows must be at least {least}, .* {count} partitions, got {least - 1}$"):
            method(rows=least - 1, num_partitions=count).bind(num_ids)


@given(st.integers(1, 2**40), st.integers(1, 6), st.integers(0, 2**41))
def test_any_budget_from_the_least_on_is_kept(num_ids: int, count: int, spare: int) -> None:
    for method in (MixedRadix, ChineseRemainder):
        least = method(balanced=True, num_partitions=count).bind(num_ids).num_rows
        for rows in (least, least + spare % 1000, least + spare):
            partitions = method(rows=rows, num_partitions=count).bind(num_ids)
            assert partitions.num_rows <= rows
            assert partitions.main == 0
            assert partitions.sizes[0] >= method(balanced=True, num_partitions=count).bind(num_ids).sizes[0]
    for grouping in ("strided", "adjacent"):
        least = QuotientRemainder(balanced=True).bind(num_ids).num_rows
        m = QuotientRemainder(rows=least + spare, grouping=grouping).bind(num_ids).sizes[1]
        assert QuotientRemainder(num_collisions=m, grouping=grouping).bind(num_ids).num_rows <= least + spare
        assert (
            m == 1 or QuotientRemainder(num_collisions=m - 1, grouping=grouping).bind(num_ids).num_rows > least + spare
        )


@pytest.mark.parametrize("num_ids", [2**40, 2**40 - 1, 2**31, 10**12 + 39])
def test_searches_are_fast(num_ids: int) -> None:
    for count in (2, 3, 4, 8):
        for method in (MixedRadix, ChineseRemainder):
            start = time.process_time()
            least = method(balanced=True, num_partitions=count).bind(num_ids).num_rows
            for rows in (least, least + 1, least + least // 10, 10 * least, num_ids // 4, num_ids + count):
                method(rows=rows, num_partitions=count).bind(num_ids)
            assert time.process_time() - start < 1.0


def test_known_sizes_at_the_largest_number_of_ids() -> None:
    assert QuotientRemainder(balanced=True).bind(2**40).sizes == (2**20, 2**20)
    assert MixedRadix(balanced=True, num_partitions=4).bind(2**40).sizes == (1024, 1024, 1024, 1024)
    assert ChineseRemainder(balanced=True, num_partitions=2).bind(2**40).sizes == (2**20 + 1, 2**20)
    for method in (MixedRadix, ChineseRemainder):
        assert method(balanced=True, num_partitions=1).bind(2**40).sizes == (2**40,)


@pytest.mark.parametrize(
    ("count", "least", "rows", "sizes"),
    [
        (2, 2_097_152, 2_100_000, (1_104_666, 995_334)),
        (3, 30_964, 31_000, (11_047, 9_977, 9_976)),
        (3, 30_964, 2_100_000, (2_098_552, 724, 724)),
        (4, 4_096, 10_000, (8_481, 507, 506, 506)),
    ],
)
def test_2_40_ids_in_any_number_of_rows(count: int, least: int, rows: int, sizes: tuple[int, ...]) -> None:
    assert math.prod(sizes) >= 2**40
    assert sum(sizes) == rows
    assert MixedRadix(num_partitions=count, rows=rows).bind(2**40).sizes == sizes
    assert MixedRadix(num_partitions=count, rows=least).bind(2**40).num_rows == least
    with pytest.raises(ValueError, match=rf"rows must be at least {least}, the least total .* got {least - 1}"):
        MixedRadix(num_partitions=count, rows=least - 1).bind(2**40)


def test_budget_of_a_full_table_and_more() -> None:
    for rows in (101, 10**9):
        assert QuotientRemainder(rows=rows).bind(100).sizes == (100, 1)
    for method in (MixedRadix, ChineseRemainder):
        assert method(rows=10**9, num_partitions=3).bind(100).sizes == (100, 1, 1)
    assert MixedRadix(rows=100, num_partitions=2).bind(100).sizes == (98, 2)
    assert ChineseRemainder(rows=100, num_partitions=2).bind(100).sizes == (97, 2)
    assert HashPartition(rows=10**9).bind(100).sizes == (100,)


@pytest.mark.parametrize(
    ("found", "num_ids", "expected"),
    [
        (QuotientRemainder(compression=3.99), 1_000_000, QuotientRemainder(num_collisions=4)),
        (QuotientRemainder(compression=4.0), 1_000_000, QuotientRemainder(num_collisions=5)),
        (
            QuotientRemainder(compression=60, grouping="adjacent"),
            1_000_000,
            QuotientRemainder(num_collisions=61, grouping="adjacent"),
        ),
        (QuotientRemainder(compression=1.0), 100, QuotientRemainder(num_collisions=2)),
        (MixedRadix(compression=4.0, num_partitions=3), 1_000_000, MixedRadix(sizes=[249_995, 3, 2])),
        (MixedRadix(compression=1.0), 1_000_000, MixedRadix(sizes=[999_998, 2])),
        (ChineseRemainder(compression=4.0), 1_000_000, ChineseRemainder(sizes=[249_994, 5])),
        (ChineseRemainder(compression=1.0), 1_000_000, ChineseRemainder(sizes=[999_997, 2])),
        (HashPartition(compression=2.5), 1_000_000, HashPartition(rows=400_000)),
        (HashPartition(compression=2), 7, HashPartition(rows=3)),
    ],
)
def test_compression(found: PartitionSpec, num_ids: int, expected: PartitionSpec) -> None:
    assert found.bind(num_ids) == expected.bind(num_ids)
