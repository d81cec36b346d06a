"""Each kind of partitions selects its rows by exact arithmetic, and no two ids share all rows."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchrec_qr.partitions import (
    BoundPartitions,
    ChineseRemainder,
    ClosedForm,
    ExplicitPartitions,
    HashPartition,
    MixedRadix,
    PartitionSpec,
    QuotientRemainder,
)

GROUPINGS = ("strided", "adjacent")
# Tests look at both sides of these: float32 loses integers, int32 ends, the supported ids end.
EDGES = (2**24, 2**31, 2**40 - 1)
PAPER_EXAMPLE = [[0, 1, 2, 1, 1], [0, 0, 1, 0, 1], [0, 1, 1, 0, 1]]


def spec_of_each_kind() -> list[PartitionSpec]:
    return [
        QuotientRemainder(num_collisions=2),
        QuotientRemainder(num_collisions=2, grouping="adjacent"),
        MixedRadix(sizes=[2, 2, 2]),
        ChineseRemainder(sizes=[3, 2]),
        HashPartition(rows=3),
        ExplicitPartitions(PAPER_EXAMPLE),
    ]


def one_of_each_kind() -> list[BoundPartitions]:
    return [spec.bind(5) for spec in spec_of_each_kind()]


SPECS = [pytest.param(spec, id=repr(spec)) for spec in spec_of_each_kind()]
KINDS = [pytest.param(spec.bind(5), id=repr(spec)) for spec in spec_of_each_kind()]

num_ids_near_edges = st.one_of(
    *(st.integers(edge - 1000, min(edge + 1000, 2**40)) for edge in EDGES), st.integers(1, 2**40)
)


@st.composite
def num_ids_and_ids(draw: st.DrawFn) -> tuple[int, list[int]]:
    num_ids = draw(num_ids_near_edges)
    anywhere = st.integers(0, num_ids - 1)
    near_end = st.integers(max(0, num_ids - 100), num_ids - 1)
    return num_ids, [0, num_ids - 1, *draw(st.lists(st.one_of(anywhere, near_end), max_size=20))]


def rows(partitions: BoundPartitions, ids: list[int]) -> list[tuple[int, ...]]:
    int64 = partitions.rows(torch.tensor(ids, dtype=torch.int64))
    assert int64.dtype == torch.int64
    small = torch.tensor([x for x in ids if x < 2**31], dtype=torch.int32)
    assert torch.equal(partitions.rows(small), int64[torch.tensor(ids) < 2**31])
    return [tuple(row) for row in int64.tolist()]


def all_unique(partitions: ClosedForm) -> bool:
    """Looks at all ids: every row is in its table, and no two ids have the same rows."""
    codes = torch.zeros(1, dtype=torch.int64)
    for row, size in zip(partitions.class_rows(torch.arange(partitions.num_embeddings)), partitions.sizes, strict=True):
        if row.min() < 0 or row.max() >= size:
            return False
        codes = codes * size + row
    return int(np.bincount(codes.numpy()).max()) == 1


# --- exact rows, against Python's integers ---


@given(num_ids_and_ids(), st.data())
def test_quotient_remainder_is_exact(case: tuple[int, list[int]], data: st.DataObject) -> None:
    num_ids, ids = case
    m = data.draw(st.one_of(st.integers(1, num_ids), st.integers(1, min(num_ids, 100))))
    main_rows = -(-num_ids // m)
    strided = QuotientRemainder(num_collisions=m).bind(num_ids)
    assert strided.sizes == (main_rows, -(-num_ids // main_rows))
    assert strided.sizes[1] <= m
    assert rows(strided, ids) == [(x % main_rows, x // main_rows) for x in ids]
    assert all(p < size for row in rows(strided, ids) for p, size in zip(row, strided.sizes, strict=True))
    adjacent = QuotientRemainder(num_collisions=m, grouping="adjacent").bind(num_ids)
    assert adjacent.sizes == (main_rows, m)
    assert rows(adjacent, ids) == [(x // m, x % m) for x in ids]
    assert strided.is_complementary()
    assert adjacent.is_complementary()
    assert all(p < size for row in rows(adjacent, ids) for p, size in zip(row, adjacent.sizes, strict=True))


@given(num_ids_and_ids(), st.lists(st.integers(1, 2**20), max_size=4))
def test_mixed_radix_is_exact_and_decodes(case: tuple[int, list[int]], sizes: list[int]) -> None:
    num_ids, ids = case
    sizes = [*sizes, -(-num_ids // math.prod(sizes))]
    partitions = MixedRadix(sizes=sizes).bind(num_ids)
    strides = [math.prod(sizes[:j]) for j in range(len(sizes))]
    digits = rows(partitions, ids)
    assert digits == [tuple(x // stride % size for stride, size in zip(strides, sizes, strict=True)) for x in ids]
    assert [sum(p * stride for p, stride in zip(row, strides, strict=True)) for row in digits] == ids
    assert partitions.is_complementary()


@given(num_ids_and_ids(), st.integers(1, 5), st.integers(0, 10**6))
def test_chinese_remainder_is_exact_and_decodes(case: tuple[int, list[int]], count: int, spare: int) -> None:
    num_ids, ids = case
    partitions = ChineseRemainder(
        rows=ChineseRemainder(balanced=True, num_partitions=count).bind(num_ids).num_rows + spare, num_partitions=count
    ).bind(num_ids)
    remainders = rows(partitions, ids)
    assert remainders == [tuple(x % size for size in partitions.sizes) for x in ids]
    product = math.prod(partitions.sizes)
    weights = [product // size * pow(product // size, -1, size) for size in partitions.sizes]
    assert [sum(p * w for p, w in zip(row, weights, strict=True)) % product for row in remainders] == ids
    assert partitions.is_complementary()


@given(num_ids_and_ids(), st.integers(1, 2**40))
def test_hash_partition_is_exact(case: tuple[int, list[int]], num_rows: int) -> None:
    num_ids, ids = case
    partitions = HashPartition(rows=num_rows).bind(num_ids)
    assert rows(partitions, ids) == [(x % num_rows,) for x in ids]
    assert partitions.is_complementary() == (num_rows >= num_ids)


def test_strides_beyond_int64_give_digit_zero() -> None:
    partitions = MixedRadix(sizes=[2**40, 2**40, 2**40, 3]).bind(2**40)
    assert partitions.rows(torch.tensor([0, 2**40 - 1])).tolist() == [[0, 0, 0, 0], [2**40 - 1, 0, 0, 0]]


def test_rows_stay_inside_the_tables_for_any_integer() -> None:
    for partitions in one_of_each_kind()[:-1]:
        found = partitions.rows(torch.tensor([-(2**63), -1, 5, 2**31, 2**63 - 1]))
        assert (found >= 0).all()
        assert (found < torch.tensor(partitions.sizes)).all()


# --- every id apart ---


@pytest.mark.parametrize("most", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_quotient_remainder_keeps_all_ids_apart(most: int) -> None:
    ids = np.arange(most)
    for num_ids in range(1, most + 1):
        # All m with the same ⌈S/m⌉ select the same strided rows (next test), so one of each stands for all.
        for m in {-(-num_ids // m): m for m in range(1, num_ids + 1)}.values():
            partitions = QuotientRemainder(num_collisions=m).bind(num_ids)
            (main_rows, other_rows), (one, stride) = partitions.sizes, partitions.strides
            codes = (ids[:num_ids] // one % main_rows) * other_rows + ids[:num_ids] // stride % other_rows
            assert np.bincount(codes).max() == 1, partitions
            assert codes.max() < main_rows * other_rows, partitions


def test_adjacent_quotient_remainder_keeps_all_ids_apart_up_to_2000() -> None:
    for m in range(1, 2001):
        assert all_unique(QuotientRemainder(num_collisions=m, grouping="adjacent").bind(2000)), m
    # The rows of an id depend on m alone: what remains is that fewer ids have tables that hold them.
    for num_ids in [*range(1, 130), *range(130, 2000, 61)]:
        for m in range(1, num_ids + 1):
            partitions = QuotientRemainder(num_collisions=m, grouping="adjacent").bind(num_ids)
            assert partitions.strides == (m, 1)
            assert partitions.sizes == ((num_ids - 1) // m + 1, m)


def test_strided_rows_depend_on_the_main_rows_alone() -> None:
    for num_ids in [*range(1, 130), *range(130, 2001, 61)]:
        of_main_rows: dict[int, ClosedForm] = {}
        for m in range(1, num_ids + 1):
            partitions = QuotientRemainder(num_collisions=m).bind(num_ids)
            assert partitions == of_main_rows.setdefault(-(-num_ids // m), partitions)


@pytest.mark.parametrize("method", [MixedRadix, ChineseRemainder])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_balanced_sizes_keep_all_ids_apart_up_to_2000(
    method: type[MixedRadix] | type[ChineseRemainder], count: int
) -> None:
    for num_ids in range(1, 2001):
        partitions = method(balanced=True, num_partitions=count).bind(num_ids)
        assert all_unique(partitions), partitions


@given(st.integers(1, 60), st.integers(1, 60))
def test_groupings_are_one_method_up_to_a_bijection_of_ids(m: int, main_rows: int) -> None:
    num_ids = m * main_rows
    x = torch.arange(num_ids)
    permuted = (x % main_rows) * m + x // main_rows
    assert sorted(permuted.tolist()) == x.tolist()
    strided = QuotientRemainder(num_collisions=m).bind(num_ids)
    adjacent = QuotientRemainder(num_collisions=m, grouping="adjacent").bind(num_ids)
    assert strided.sizes == adjacent.sizes == (main_rows, m)
    assert torch.equal(strided.rows(x), adjacent.rows(permuted))


# --- as an object ---


@pytest.mark.parametrize("partitions", KINDS)
def test_class_rows_are_the_columns_of_rows_in_any_shape(partitions: BoundPartitions) -> None:
    ids = torch.tensor([[0, 1, 2], [4, 3, 0]], dtype=torch.int32)
    found = partitions.class_rows(ids)
    assert len(found) == partitions.num_partitions
    expected = partitions.rows(ids.flatten())
    for j, row in enumerate(found):
        assert row.dtype == torch.int64
        assert torch.equal(row, expected[:, j].reshape(2, 3))
    assert partitions.rows(ids[0, :0]).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.int16])
@pytest.mark.parametrize("partitions", KINDS)
def test_rows_refuse_other_dtypes(partitions: BoundPartitions, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError) as error:
        partitions.rows(torch.zeros(3, dtype=dtype))
    assert str(error.value) == f"{type(partitions).__name__}: ids must be torch.int32 or torch.int64, got {dtype}"


def test_rows_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"^ClosedForm: ids must be one-dimensional, \(N,\), got shape \(2, 3\)$"):
        HashPartition(rows=3).bind(5).rows(torch.zeros(2, 3, dtype=torch.int64))


def test_main_is_the_first_of_the_largest() -> None:
    assert QuotientRemainder(num_collisions=4).bind(100).main == 0
    assert QuotientRemainder(num_collisions=25, grouping="adjacent").bind(100).main == 1
    digits = MixedRadix(sizes=[2, 4, 3, 4]).bind(30)
    assert (digits.main, digits.num_partitions, digits.num_rows) == (1, 4, 13)


@pytest.mark.parametrize("spec", SPECS)
def test_specs_survive_pickle_and_copies(spec: PartitionSpec) -> None:
    for restored in (pickle.loads(pickle.dumps(spec)), copy.copy(spec), copy.deepcopy(spec)):  # noqa: S301
        assert restored == spec
        assert hash(restored) == hash(spec)
        assert restored.bind(5) == spec.bind(5)


@pytest.mark.parametrize("partitions", KINDS)
def test_pickle_and_copies_are_equal(partitions: BoundPartitions) -> None:
    restored = pickle.loads(pickle.dumps(partitions))  # noqa: S301
    assert restored == partitions
    assert hash(restored) == hash(partitions)
    ids = torch.arange(5)
    assert torch.equal(restored.rows(ids), partitions.rows(ids))
    assert copy.deepcopy(partitions) == partitions
    assert copy.copy(partitions) == partitions
    assert copy.deepcopy(nn.ModuleList([WithPartitions(partitions)]))[0].partitions == partitions


def test_different_partitions_differ() -> None:
    different: list[BoundPartitions] = [
        *one_of_each_kind(),
        QuotientRemainder(num_collisions=2).bind(6),
        QuotientRemainder(num_collisions=3).bind(5),
        MixedRadix(sizes=[4, 2]).bind(5),
        ChineseRemainder(sizes=[3, 2]).bind(6),
        ChineseRemainder(sizes=[2, 3]).bind(5),
        HashPartition(rows=4).bind(5),
        ExplicitPartitions([*PAPER_EXAMPLE[:1], [0, 1, 1, 0, 1], [0, 0, 1, 0, 1]]).bind(5),
    ]
    assert len(set(different)) == len(different) == 13
    assert [a == b for a in different for b in different] == torch.eye(13).bool().flatten().tolist()
    assert set(one_of_each_kind()) < set(different)
    assert QuotientRemainder(num_collisions=2).bind(5) != "QuotientRemainder(num_collisions=2)"


def test_specs_are_compared_by_what_they_say() -> None:
    different: list[PartitionSpec] = [
        *spec_of_each_kind(),
        QuotientRemainder(num_collisions=3),
        QuotientRemainder(rows=5),
        MixedRadix(balanced=True),
        MixedRadix(balanced=True, num_partitions=3),
        MixedRadix(sizes=[3, 2]),
        HashPartition(compression=3),
        ExplicitPartitions(file="classes.npy"),
        ExplicitPartitions(file="others.npy"),
        ExplicitPartitions([[0, 1, 2, 1, 1], [0, 1, 1, 0, 1], [0, 0, 1, 0, 1]]),
    ]
    assert [a == b for a in different for b in different] == torch.eye(15).bool().flatten().tolist()
    assert len(set(different)) == 15
    assert set(spec_of_each_kind()) < set(different)
    for sizes in ((3, 2), torch.tensor([3, 2]), np.array([3, 2]), (n for n in (3, 2))):
        assert MixedRadix(sizes=sizes) == MixedRadix(sizes=[3, 2])  # type: ignore[arg-type]


def test_equal_where_the_rows_of_every_id_are() -> None:
    five, six = QuotientRemainder(num_collisions=5), QuotientRemainder(num_collisions=6)
    assert five != six
    assert five.bind(10).sizes == six.bind(10).sizes == (2, 5)
    assert five.bind(10) == six.bind(10) == MixedRadix(sizes=[2, 5]).bind(10)


@pytest.mark.parametrize("spec", SPECS)
def test_immutable(spec: PartitionSpec) -> None:
    for field in dataclasses.fields(spec):  # type: ignore[arg-type]
        with pytest.raises(AttributeError, match=f"cannot assign to field '{field.name}'"):
            setattr(spec, field.name, None)


@pytest.mark.parametrize("spec", SPECS[:-1])
def test_repr_rebuilds_a_closed_form(spec: PartitionSpec) -> None:
    assert eval(repr(spec)) == spec
    assert eval(repr(spec.bind(5))) == spec.bind(5)
    assert spec.bind(5).class_map is None


class WithPartitions(nn.Module):
    """Uses partitions as a collection does; with ``buffer`` the explicit map moves along."""

    def __init__(self, partitions: BoundPartitions, buffer: bool = False) -> None:
        super().__init__()
        self.partitions = partitions
        self.register_buffer("class_map", partitions.class_map if buffer else None, persistent=False)

    def forward(self, ids: Tensor) -> list[Tensor]:
        return self.partitions.class_rows(ids, self.class_map)


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("partitions", KINDS)
def test_traces_and_compiles(partitions: BoundPartitions, buffer: bool) -> None:
    module = WithPartitions(partitions, buffer)
    ids = torch.tensor([[0, 1], [4, 3]], dtype=torch.int32)
    expected = [row.tolist() for row in module(ids)]
    traced = torch.fx.symbolic_trace(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert [row.tolist() for row in traced(ids)] == expected
    assert [row.tolist() for row in compiled(ids)] == expected
    other = torch.arange(5)
    assert [row.tolist() for row in traced(other)] == partitions.rows(other).T.tolist()
    assert [row.tolist() for row in compiled(other)] == partitions.rows(other).T.tolist()


@pytest.mark.parametrize("partitions", KINDS)
def test_meta_ids_give_meta_rows(partitions: BoundPartitions) -> None:
    found = partitions.class_rows(torch.zeros(2, 3, dtype=torch.int32, device="meta"))
    assert [(row.shape, row.dtype, row.is_meta) for row in found] == [((2, 3), torch.int64, True)] * len(found)
