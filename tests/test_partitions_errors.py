"""What the closed forms refuse, and what they say: class, field, value given, what is allowed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from torchrec_qr.partitions import (
    MAX_NUM_IDS,
    ChineseRemainder,
    HashPartition,
    MixedRadix,
    QuotientRemainder,
)

CONSTRUCTORS: list[tuple[str, Callable[[object], object]]] = [
    ("QuotientRemainder", lambda num_ids: QuotientRemainder(num_ids, 1)),
    ("MixedRadix", lambda num_ids: MixedRadix(num_ids, [2**40, 2**40])),
    ("ChineseRemainder", lambda num_ids: ChineseRemainder(num_ids, [2**40, 2**40 - 1])),
    ("HashPartition", lambda num_ids: HashPartition(num_ids, 3)),
    ("QuotientRemainder", lambda num_ids: QuotientRemainder.balanced(num_ids)),
    ("MixedRadix", lambda num_ids: MixedRadix.balanced(num_ids)),
    ("ChineseRemainder", lambda num_ids: ChineseRemainder.balanced(num_ids)),
    ("QuotientRemainder", lambda num_ids: QuotientRemainder.for_budget(num_ids, 10)),
    ("MixedRadix", lambda num_ids: MixedRadix.for_budget(num_ids, 10)),
    ("ChineseRemainder", lambda num_ids: ChineseRemainder.for_budget(num_ids, 10)),
    ("HashPartition", lambda num_ids: HashPartition.for_budget(num_ids, 10)),
    ("QuotientRemainder", lambda num_ids: QuotientRemainder.for_compression(num_ids, 2.0)),
    ("MixedRadix", lambda num_ids: MixedRadix.for_compression(num_ids, 2.0)),
    ("ChineseRemainder", lambda num_ids: ChineseRemainder.for_compression(num_ids, 2.0)),
    ("HashPartition", lambda num_ids: HashPartition.for_compression(num_ids, 2.0)),
]


def message_of(error: type[Exception], call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(error) as raised:
        call(*arguments)
    assert type(raised.value) is error
    return str(raised.value)


@pytest.mark.parametrize(("owner", "construct"), CONSTRUCTORS)
def test_num_ids(owner: str, construct: Callable[[object], object]) -> None:
    for num_ids in (0, -5, 2**40 + 1):
        assert message_of(ValueError, construct, num_ids) == (
            f"{owner}: num_ids must be between 1 and 1099511627776 (2^40), got {num_ids}"
        )
    for wrong, name in ((5.0, "float"), (True, "bool"), ("5", "str"), (None, "NoneType")):
        assert message_of(TypeError, construct, wrong) == (
            f"{owner}: num_ids must be an int, got {wrong!r} of type {name}"
        )


def test_limits_are_inclusive() -> None:
    assert MAX_NUM_IDS == QuotientRemainder(2**40, 2**40).num_ids == 2**40
    assert MixedRadix(1, [1]).sizes == ChineseRemainder(1, [1, 1]).sizes[:1] == HashPartition(1, 1).sizes == (1,)


def test_numpy_and_torch_integers_are_ints() -> None:
    partitions = MixedRadix(np.int64(6), torch.tensor([2, 3]))
    assert partitions == MixedRadix(6, [2, 3])
    assert all(type(size) is int for size in partitions.sizes)
    assert type(partitions.num_ids) is int


@pytest.mark.parametrize("m", [0, -1, 11])
def test_num_collisions(m: int) -> None:
    assert message_of(ValueError, QuotientRemainder, 10, m) == (
        f"QuotientRemainder: num_collisions must be between 1 and 10 (num_ids), got {m}"
    )


def test_num_collisions_type() -> None:
    assert message_of(TypeError, QuotientRemainder, 10, 2.5) == (
        "QuotientRemainder: num_collisions must be an int, got 2.5 of type float"
    )


@pytest.mark.parametrize("grouping", ["Strided", "", None, 3])
def test_grouping(grouping: object) -> None:
    for construct in (
        lambda: QuotientRemainder(10, 2, grouping),
        lambda: QuotientRemainder.balanced(10, grouping=grouping),
        lambda: QuotientRemainder.for_budget(10, 9, grouping=grouping),
    ):
        assert message_of(ValueError, construct) == (
            f"QuotientRemainder: grouping must be 'strided' or 'adjacent', got {grouping!r}"
        )


@pytest.mark.parametrize("method", [MixedRadix, ChineseRemainder])
def test_sizes(method: type[MixedRadix] | type[ChineseRemainder]) -> None:
    owner = method.__name__
    assert message_of(ValueError, method, 10, []) == f"{owner}: sizes must hold at least one size, got none"
    for wrong in (0, -3, 2**40 + 1):
        assert message_of(ValueError, method, 10, [7, wrong]) == (
            f"{owner}: sizes[1] must be between 1 and 1099511627776 (2^40), got {wrong}"
        )
    assert message_of(TypeError, method, 10, [7.0, 2]) == (f"{owner}: sizes[0] must be an int, got 7.0 of type float")
    assert message_of(TypeError, method, 10, 12) == (f"{owner}: sizes must be a sequence of ints, got 12 of type int")
    assert message_of(TypeError, method, 10, "25") == (
        f"{owner}: sizes must be a sequence of ints, got '25' of type str"
    )


@pytest.mark.parametrize("method", [MixedRadix, ChineseRemainder])
@pytest.mark.parametrize(("num_ids", "sizes"), [(7, [2, 3]), (1000, [7, 9, 5]), (2**40, [2**20 - 1, 2**20]), (3, [1])])
def test_product_too_small_names_the_smallest_ids_that_collide(
    method: type[MixedRadix] | type[ChineseRemainder], num_ids: int, sizes: list[int]
) -> None:
    product = int(np.prod(np.array(sizes, dtype=object)))
    assert message_of(ValueError, method, num_ids, sizes) == (
        f"{method.__name__}: the product of sizes must be at least num_ids ({num_ids}), got sizes {sizes} with product "
        f"{product}: ids 0 and {product} would share all rows"
    )
    enough = method(product, sizes)  # one id fewer than would collide
    if product <= 1000:
        rows = enough.rows(torch.arange(product + 1))
        assert len({tuple(row) for row in rows[:-1].tolist()}) == product
        assert rows[0].tolist() == rows[product].tolist()


@pytest.mark.parametrize(
    ("sizes", "i", "j", "common"),
    [([100, 5], 0, 1, 5), ([7, 12, 25, 9], 1, 3, 3), ([4, 4], 0, 1, 4), ([2**20, 2**20 + 2], 0, 1, 2)],
)
def test_sizes_not_coprime(sizes: list[int], i: int, j: int, common: int) -> None:
    """DeepRec#909 pairs 100 with 5."""
    assert message_of(ValueError, ChineseRemainder, 10, sizes) == (
        f"ChineseRemainder: sizes must be pairwise coprime, got {sizes}: sizes[{i}] = {sizes[i]} and sizes[{j}] = "
        f"{sizes[j]} have the common factor {common}"
    )


def test_num_rows() -> None:
    for wrong in (0, -1, 2**40 + 1):
        assert message_of(ValueError, HashPartition, 10, wrong) == (
            f"HashPartition: num_rows must be between 1 and 1099511627776 (2^40), got {wrong}"
        )
    assert message_of(TypeError, HashPartition, 10, "3") == (
        "HashPartition: num_rows must be an int, got '3' of type str"
    )


def test_num_partitions() -> None:
    assert message_of(ValueError, QuotientRemainder.balanced, 10, 3) == (
        "QuotientRemainder: num_partitions must be 2 (MixedRadix takes more), got 3"
    )
    assert message_of(ValueError, MixedRadix.balanced, 10, 0) == (
        "MixedRadix: num_partitions must be at least 1, got 0"
    )
    assert message_of(ValueError, ChineseRemainder.for_budget, 10, 10, 9) == (
        "ChineseRemainder: num_partitions must be between 1 and 8 (give more sizes to the constructor), got 9"
    )
    for method in (QuotientRemainder, MixedRadix, ChineseRemainder):
        assert message_of(TypeError, method.balanced, 10, 2.0) == (
            f"{method.__name__}: num_partitions must be an int, got 2.0 of type float"
        )


@pytest.mark.parametrize(("method", "least"), [(QuotientRemainder, 2048), (MixedRadix, 2048), (ChineseRemainder, 2049)])
def test_budget_too_small(
    method: type[QuotientRemainder] | type[MixedRadix] | type[ChineseRemainder], least: int
) -> None:
    told = (
        f"{method.__name__}: rows must be at least {least}, the least total that keeps 1048576 ids apart with 2 "
        "partitions, got "
    )
    assert message_of(ValueError, method.for_budget, 2**20, least - 1) == f"{told}{least - 1}"
    assert message_of(ValueError, method.for_budget, 2**20, -1) == f"{told}-1"
    assert message_of(ValueError, method.for_compression, 2**20, 1024.0) == f"{told}1024 (ratio 1024.0)"
    assert method.for_budget(2**20, least).num_rows == least
    assert message_of(TypeError, method.for_budget, 2**20, 1e6) == (
        f"{method.__name__}: rows must be an int, got 1000000.0 of type float"
    )


def test_hash_budget_too_small() -> None:
    assert message_of(ValueError, HashPartition.for_budget, 10, 0) == ("HashPartition: rows must be at least 1, got 0")
    assert message_of(ValueError, HashPartition.for_compression, 10, 10.5) == (
        "HashPartition: ratio must be at most num_ids (10), got 10.5"
    )


@pytest.mark.parametrize("method", [QuotientRemainder, MixedRadix, ChineseRemainder, HashPartition])
def test_ratio(
    method: type[QuotientRemainder] | type[MixedRadix] | type[ChineseRemainder] | type[HashPartition],
) -> None:
    for wrong in (0.5, 0, -2.0, float("inf"), float("nan")):
        assert message_of(ValueError, method.for_compression, 100, wrong) == (
            f"{method.__name__}: ratio must be finite and at least 1, got {wrong}"
        )
    assert message_of(TypeError, method.for_compression, 100, "4") == (
        f"{method.__name__}: ratio must be a float, got '4' of type str"
    )
