"""The specs of closed forms refuse bad values by a message: class, field, value given, what is allowed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from torchrec_qr.partitions import (
    MAX_NUM_EMBEDDINGS,
    ChineseRemainder,
    HashPartition,
    MixedRadix,
    PartitionSpec,
    QuotientRemainder,
)

SPECS: list[PartitionSpec] = [
    QuotientRemainder(num_collisions=1),
    MixedRadix(sizes=[2**40, 2**40]),
    ChineseRemainder(sizes=[2**40, 2**40 - 1]),
    *(spec(balanced=True) for spec in (QuotientRemainder, MixedRadix, ChineseRemainder)),
    *(spec(rows=10) for spec in (QuotientRemainder, MixedRadix, ChineseRemainder, HashPartition)),
    *(spec(compression=2.0) for spec in (QuotientRemainder, MixedRadix, ChineseRemainder, HashPartition)),
]


def message_of(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    return str(raised.value)


def refusal(error: type[Exception], spec: PartitionSpec, num_embeddings: Any) -> str:
    return message_of(error, lambda: spec.bind(num_embeddings))


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_num_embeddings(spec: PartitionSpec) -> None:
    owner = type(spec).__name__
    for given in (0, -5, 2**40 + 1):
        assert refusal(ValueError, spec, given) == (
            f"{owner}: num_embeddings must be between 1 and 1099511627776 (2^40), got {given}"
        )
    for wrong, name in ((5.0, "float"), (True, "bool"), ("5", "str"), (None, "NoneType")):
        assert refusal(TypeError, spec, wrong) == (
            f"{owner}: num_embeddings must be an int, got {wrong!r} of type {name}"
        )


def test_limits_are_inclusive() -> None:
    assert MAX_NUM_EMBEDDINGS == QuotientRemainder(num_collisions=2**40).bind(2**40).num_embeddings == 2**40
    for spec in (MixedRadix(sizes=[1]), ChineseRemainder(sizes=[1, 1]), HashPartition(rows=1)):
        assert spec.bind(1).sizes[:1] == (1,)


def test_numpy_and_torch_integers_are_ints() -> None:
    bound = MixedRadix(sizes=torch.tensor([2, 3])).bind(np.int64(6))  # type: ignore[arg-type]
    assert bound == MixedRadix(sizes=[2, 3]).bind(6)
    assert all(type(size) is int for size in bound.sizes)
    assert type(bound.num_embeddings) is int


@pytest.mark.parametrize("spec", [QuotientRemainder, MixedRadix, ChineseRemainder, HashPartition])
def test_sized_in_exactly_one_way(spec: type[Any]) -> None:
    own = {QuotientRemainder: "num_collisions", MixedRadix: "sizes", ChineseRemainder: "sizes"}
    names = [own[spec], "compression", "rows", "balanced"] if spec in own else ["rows", "compression"]
    told = f"{spec.__name__}: exactly one of {', '.join(names)} must be given, got "
    assert message_of(ValueError, spec) == f"{told}none"
    assert message_of(ValueError, lambda: spec(rows=8, compression=2.0)) == (
        f"{told}{'compression and rows' if spec in own else 'rows and compression'}"
    )
    if spec in own:
        assert message_of(ValueError, lambda: spec(balanced=False)) == f"{told}none"
        assert (
            message_of(ValueError, lambda: spec(balanced=True, **{own[spec]: [3]})) == f"{told}{own[spec]} and balanced"
        )
    with pytest.raises(TypeError, match="positional"):
        spec(10)  # a spec takes no S


@pytest.mark.parametrize("m", [0, -1, 11])
def test_num_collisions(m: int) -> None:
    assert refusal(ValueError, QuotientRemainder(num_collisions=m), 10) == (
        f"QuotientRemainder: num_collisions must be between 1 and 10 (num_embeddings), got {m}"
    )


def test_num_collisions_type() -> None:
    assert refusal(TypeError, QuotientRemainder(num_collisions=2.5), 10) == (  # type: ignore[arg-type]
        "QuotientRemainder: num_collisions must be an int, got 2.5 of type float"
    )


@pytest.mark.parametrize("grouping", ["Strided", "", None, 3])
def test_grouping(grouping: Any) -> None:
    for size in ({"num_collisions": 2}, {"balanced": True}, {"rows": 9}):
        assert refusal(ValueError, QuotientRemainder(**size, grouping=grouping), 10) == (  # type: ignore[arg-type]
            f"QuotientRemainder: grouping must be 'strided' or 'adjacent', got {grouping!r}"
        )


@pytest.mark.parametrize("spec", [MixedRadix, ChineseRemainder])
def test_sizes(spec: type[MixedRadix] | type[ChineseRemainder]) -> None:
    owner = spec.__name__
    assert refusal(ValueError, spec(sizes=[]), 10) == f"{owner}: sizes must hold at least one size, got none"
    for wrong in (0, -3, 2**40 + 1):
        assert refusal(ValueError, spec(sizes=[7, wrong]), 10) == (
            f"{owner}: sizes[1] must be between 1 and 1099511627776 (2^40), got {wrong}"
        )
    for sizes, told in (
        ([7.0, 2], "sizes[0] must be an int, got 7.0 of type float"),
        (torch.tensor([7.0, 2.0]), "sizes[0] must be an int, got 7.0 of type float"),
        ([7, True], "sizes[1] must be an int, got True of type bool"),
        (12, "sizes must be a sequence of ints, got 12 of type int"),
        ("25", "sizes must be a sequence of ints, got '25' of type str"),
    ):
        assert refusal(TypeError, spec(sizes=sizes), 10) == f"{owner}: {told}"  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [MixedRadix, ChineseRemainder])
@pytest.mark.parametrize(("num_ids", "sizes"), [(7, [2, 3]), (1000, [7, 9, 5]), (2**40, [2**20 - 1, 2**20]), (3, [1])])
def test_product_too_small_names_the_smallest_ids_that_collide(
    spec: type[MixedRadix] | type[ChineseRemainder], num_ids: int, sizes: list[int]
) -> None:
    product = int(np.prod(np.array(sizes, dtype=object)))
    assert refusal(ValueError, spec(sizes=sizes), num_ids) == (
        f"{spec.__name__}: the product of sizes must be at least num_embeddings ({num_ids}), got sizes {sizes} with "
        f"product {product}: ids 0 and {product} would share all rows"
    )
    enough = spec(sizes=sizes).bind(product)  # one id fewer than would collide
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
    assert refusal(ValueError, ChineseRemainder(sizes=sizes), 10) == (
        f"ChineseRemainder: sizes must be pairwise coprime, got {sizes}: sizes[{i}] = {sizes[i]} and sizes[{j}] = "
        f"{sizes[j]} have the common factor {common}"
    )


def test_rows_of_a_hash() -> None:
    for wrong in (0, -1):
        assert refusal(ValueError, HashPartition(rows=wrong), 10) == (
            f"HashPartition: rows must be at least 1, got {wrong}"
        )
    assert refusal(TypeError, HashPartition(rows="3"), 10) == (  # type: ignore[arg-type]
        "HashPartition: rows must be an int, got '3' of type str"
    )
    assert refusal(ValueError, HashPartition(compression=10.5), 10) == (
        "HashPartition: compression must be at most num_embeddings (10), got 10.5"
    )


def test_num_partitions() -> None:
    assert refusal(ValueError, MixedRadix(balanced=True, num_partitions=0), 10) == (
        "MixedRadix: num_partitions must be at least 1, got 0"
    )
    assert refusal(ValueError, ChineseRemainder(rows=10, num_partitions=9), 10) == (
        "ChineseRemainder: num_partitions must be between 1 and 8 (more partitions need sizes), got 9"
    )
    for spec in (MixedRadix, ChineseRemainder):
        assert refusal(TypeError, spec(balanced=True, num_partitions=2.0), 10) == (  # type: ignore[arg-type]
            f"{spec.__name__}: num_partitions must be an int, got 2.0 of type float"
        )
        assert message_of(ValueError, lambda spec=spec: spec(sizes=[5, 2], num_partitions=2)) == (
            f"{spec.__name__}: num_partitions must not be given beside sizes, got 2"
        )


@pytest.mark.parametrize(("spec", "least"), [(QuotientRemainder, 2048), (MixedRadix, 2048), (ChineseRemainder, 2049)])
def test_budget_too_small(spec: type[Any], least: int) -> None:
    told = (
        f"{spec.__name__}: rows must be at least {least}, the least total that keeps 1048576 ids apart with 2 "
        "partitions, got "
    )
    assert refusal(ValueError, spec(rows=least - 1), 2**20) == f"{told}{least - 1}"
    assert refusal(ValueError, spec(rows=-1), 2**20) == f"{told}-1"
    assert refusal(ValueError, spec(compression=1024.0), 2**20) == f"{told}1024 (compression 1024.0)"
    assert spec(rows=least).bind(2**20).num_rows == least
    assert refusal(TypeError, spec(rows=1e6), 2**20) == (
        f"{spec.__name__}: rows must be an int, got 1000000.0 of type float"
    )


@pytest.mark.parametrize("spec", [QuotientRemainder, MixedRadix, ChineseRemainder, HashPartition])
def test_compression(spec: type[Any]) -> None:
    for wrong in (0.5, 0, -2.0, float("inf"), float("nan")):
        assert refusal(ValueError, spec(compression=wrong), 100) == (
            f"{spec.__name__}: compression must be finite and at least 1, got {wrong}"
        )
    for given, name in (("4", "str"), (True, "bool")):
        assert refusal(TypeError, spec(compression=given), 100) == (
            f"{spec.__name__}: compression must be a float, got {given!r} of type {name}"
        )
