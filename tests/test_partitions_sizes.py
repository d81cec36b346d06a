"""The sizes that `balanced`, `for_budget` and `for_compression` choose, against brute force."""

import math
import time
from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_qr.partitions import ChineseRemainder, HashPartition, MixedRadix, QuotientRemainder

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
        partitions = method.balanced(num_ids, count)
        assert partitions.num_rows == expected[num_ids], partitions
        assert list(partitions.sizes) == sorted(partitions.sizes, reverse=True)
        assert partitions.num_partitions == count


def test_balanced_quotient_remainder_has_the_least_total() -> None:
    for num_ids in range(1, MAX_BRUTE + 1):
        m = np.arange(1, num_ids + 1)
        main_rows = -(-num_ids // m)
        strided = QuotientRemainder.balanced(num_ids)
        assert strided.num_rows == (main_rows + -(-num_ids // main_rows)).min(), num_ids
        adjacent = QuotientRemainder.balanced(num_ids, grouping="adjacent")
        assert adjacent.num_rows == (main_rows + m).min(), num_ids
        assert strided.main == adjacent.main == 0
        assert (strided.grouping, adjacent.grouping) == ("strided", "adjacent")


@pytest.mark.parametrize("grouping", ["strided", "adjacent"])
def test_quotient_remainder_for_budget_has_the_fewest_collisions(grouping: str) -> None:
    for num_ids in [*range(1, 60), 100, 127, 210, 211, 400]:
        totals = [QuotientRemainder(num_ids, m, grouping).num_rows for m in range(1, num_ids + 1)]
        for rows in range(1, num_ids + 4):
            fitting = [m for m, total in enumerate(totals, start=1) if total <= rows]
            if fitting:
                found = QuotientRemainder.for_budget(num_ids, rows, grouping=grouping)
                assert (found.num_collisions, found.grouping) == (fitting[0], grouping), (num_ids, rows)
            else:
                with pytest.raises(ValueError, match=f"rows must be at least {min(totals)}, .* got {rows}$"):
                    QuotientRemainder.for_budget(num_ids, rows, grouping=grouping)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("method", [MixedRadix, ChineseRemainder])
def test_for_budget_has_the_largest_main_and_the_least_others(method: Searched, count: int) -> None:
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
            found = method.for_budget(num_ids, rows, count)
            assert (found.sizes[0], -found.num_rows) == reached, (num_ids, rows, found)
            assert found.main == 0
            assert found.num_partitions == count
        with pytest.raises(ValueError, match=f"rows must be at least {least}, .* {count} partitions, got {least - 1}$"):
            method.for_budget(num_ids, least - 1, count)


@given(st.integers(1, 2**40), st.integers(1, 6), st.integers(0, 2**41))
def test_any_budget_from_the_least_on_is_kept(num_ids: int, count: int, spare: int) -> None:
    for method in (MixedRadix, ChineseRemainder):
        least = method.balanced(num_ids, count).num_rows
        for rows in (least, least + spare % 1000, least + spare):
            partitions = method.for_budget(num_ids, rows, count)
            assert partitions.num_rows <= rows
            assert partitions.main == 0
            assert partitions.sizes[0] >= method.balanced(num_ids, count).sizes[0]
    for grouping in ("strided", "adjacent"):
        least = QuotientRemainder.balanced(num_ids).num_rows
        m = QuotientRemainder.for_budget(num_ids, least + spare, grouping=grouping).num_collisions
        assert QuotientRemainder(num_ids, m, grouping).num_rows <= least + spare
        assert m == 1 or QuotientRemainder(num_ids, m - 1, grouping).num_rows > least + spare


@pytest.mark.parametrize("num_ids", [2**40, 2**40 - 1, 2**31, 10**12 + 39])
def test_searches_are_fast(num_ids: int) -> None:
    for count in (2, 3, 4, 8):
        for method in (MixedRadix, ChineseRemainder):
            start = time.process_time()
            least = method.balanced(num_ids, count).num_rows
            for rows in (least, least + 1, least + least // 10, 10 * least, num_ids // 4, num_ids + count):
                method.for_budget(num_ids, rows, count)
            assert time.process_time() - start < 1.0


def test_known_sizes_at_the_largest_number_of_ids() -> None:
    assert QuotientRemainder.balanced(2**40).sizes == (2**20, 2**20)
    assert MixedRadix.balanced(2**40, 4).sizes == (1024, 1024, 1024, 1024)
    assert ChineseRemainder.balanced(2**40, 2).sizes == (2**20 + 1, 2**20)
    assert MixedRadix.balanced(2**40, 1).sizes == ChineseRemainder.balanced(2**40, 1).sizes == (2**40,)


def test_budget_of_a_full_table_and_more() -> None:
    assert QuotientRemainder.for_budget(100, 101).sizes == QuotientRemainder.for_budget(100, 10**9).sizes == (100, 1)
    assert MixedRadix.for_budget(100, 10**9, 3).sizes == ChineseRemainder.for_budget(100, 10**9, 3).sizes == (100, 1, 1)
    assert MixedRadix.for_budget(100, 100, 2).sizes == (98, 2)
    assert ChineseRemainder.for_budget(100, 100, 2).sizes == (97, 2)
    assert HashPartition.for_budget(100, 10**9).sizes == (100,)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (QuotientRemainder.for_compression(1_000_000, 3.99), QuotientRemainder(1_000_000, 4)),
        (QuotientRemainder.for_compression(1_000_000, 4.0), QuotientRemainder(1_000_000, 5)),
        (
            QuotientRemainder.for_compression(1_000_000, 60, grouping="adjacent"),
            QuotientRemainder(1_000_000, 61, "adjacent"),
        ),
        (QuotientRemainder.for_compression(100, 1.0), QuotientRemainder(100, 2)),
        (MixedRadix.for_compression(1_000_000, 4.0, 3), MixedRadix(1_000_000, [249_995, 3, 2])),
        (MixedRadix.for_compression(1_000_000, 1.0), MixedRadix(1_000_000, [999_998, 2])),
        (ChineseRemainder.for_compression(1_000_000, 4.0), ChineseRemainder(1_000_000, [249_994, 5])),
        (ChineseRemainder.for_compression(1_000_000, 1.0), ChineseRemainder(1_000_000, [999_997, 2])),
        (HashPartition.for_compression(1_000_000, 2.5), HashPartition(1_000_000, 400_000)),
        (HashPartition.for_compression(7, 2), HashPartition(7, 3)),
    ],
)
def test_for_compression(found: object, expected: object) -> None:
    assert found == expected
