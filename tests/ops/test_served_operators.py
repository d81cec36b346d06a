"""The operators of served models: the kernel against PyTorch's form, and that against plain sums over ids."""

import itertools
from typing import Any

import fbgemm_gpu  # noqa: F401  (registers the quantisation of rows)
import oracle
import pytest
import torch
from torch import Tensor

from torchrec_qr import ChineseRemainder, ExplicitPartitions, HashPartition, MixedRadix, QuotientRemainder
from torchrec_qr.ops.description import PartitionLayout, TableLayout
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.ops.served_operators import ROW_TYPES, ServedTable, served_layout
from torchrec_qr.ops.serving_library import load_operators, operators_library
from torchrec_qr.ops.serving_reference import composed_by_torch, dequantised_rows, pooled_by_torch

pytestmark = pytest.mark.skipif(not load_operators(), reason="the operators' library was not built")
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
S = 97


def stored(rows: Tensor, row_type: str) -> Tensor:
    """Returns rows as they are stored."""
    if row_type in FLOATS:
        return rows.to(FLOATS[row_type])
    bits = 8 if row_type == "int8" else 4
    return torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(rows, bits)


def read(weight: Tensor, row_type: str, width: int) -> Tensor:
    """Returns stored rows as fp64, by FBGEMM's own inverse if they are quantised."""
    if row_type in FLOATS:
        return weight.double()
    bits = 8 if row_type == "int8" else 4
    return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(weight, bits)[:, :width].double()


class Case:
    """Tables, their weights, and a batch whose features come in another order than the tables'.

    The policy "hashed" stands for ids that are hashed, with the number of the table as the seed.
    """

    def __init__(self, tables: list[tuple[Any, str, int, int, str, bool, str]], seed: int, policy_ids: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.served, self.weights, self.maps = [], [], []
        self.rows, self.bound = [], []
        for number, (spec, operation, dim, features, policy, mean, row_type) in enumerate(tables):
            if spec is None:
                layout, maps, sizes = TableLayout("plain", (PartitionLayout(dim, divisor=1),)), None, [S]
                self.bound.append(None)
            else:
                bound = spec.bind(S)
                sizes = list(bound.sizes)
                widths = [dim] * len(sizes)
                if operation == "concat":
                    widths = [dim - 4 * (len(sizes) - 1), *[4] * (len(sizes) - 1)]
                layout = TableLayout(operation, partition_layouts(bound, dict(enumerate(widths))))
                maps = bound.class_map
                self.bound.append(bound)
            if policy == "hashed":
                layout, policy = layout._replace(hash_seed=number, num_ids=S), "unchecked"
            names = tuple(f"f{number}_{i}" for i in range(features))
            self.served.append(
                ServedTable(f"t{number}", names, layout, S, policy, mean, (row_type,) * len(layout.partitions))
            )
            for size, partition in zip(sizes, layout.partitions, strict=True):
                self.weights.append(stored(torch.randn(size, partition.width, generator=generator), row_type))
            if maps is not None:
                self.maps.append(maps)
        count = sum(len(t.features) for t in self.served)
        self.order = torch.randperm(count + 1, generator=generator).tolist()[:count]  # one feature is nobody's
        self.bags = 5
        lengths = torch.randint(0, 4, (count + 1, self.bags), generator=generator)
        self.lengths = lengths.flatten()
        low, high = (-3 * S, 3 * S) if policy_ids else (0, S)
        self.ids = torch.randint(low, high, (int(lengths.sum()),), generator=generator)
        self.id_weights = torch.rand(self.ids.numel(), generator=generator)
        self.layout, self.names = served_layout(self.served)
        self.columns = sum(t.layout.dim * len(t.features) for t in self.served)

    def arguments(self, weighted: bool) -> tuple[Any, ...]:
        """Returns the arguments of the operator."""
        id_weights = self.id_weights if weighted else None
        tables = (self.weights, self.maps, self.layout, self.names)
        return (*tables, self.ids, self.lengths, id_weights, self.order, self.bags, self.columns)

    def expected(self, weighted: bool) -> Tensor:
        """Returns plain sums over ids in fp64."""
        weights = iter(self.weights)
        starts = [0, *itertools.accumulate(self.lengths.tolist())]
        feature = iter(self.order)
        columns = []
        for table, bound in zip(self.served, self.bound, strict=True):
            own = [
                read(next(weights), row_type, partition.width)
                for row_type, partition in zip(table.row_types, table.layout.partitions, strict=True)
            ]
            for _ in table.features:
                position = next(feature)
                out = torch.zeros(self.bags, table.layout.dim, dtype=torch.float64)
                for b in range(self.bags):
                    begin, end = starts[position * self.bags + b], starts[position * self.bags + b + 1]
                    for n in range(begin, end):
                        x = int(self.ids[n])
                        if table.layout.hash_seed is not None:
                            (x,) = oracle.hashed(lambda x: (x,), S, table.layout.hash_seed)(x)
                        x = min(max(x, 0), S - 1) if table.out_of_range == "clamp" else x % S
                        rows = [x] if bound is None else bound.rows(torch.tensor([x]))[0].tolist()
                        found = [w[r] for w, r in zip(own, rows, strict=True)]
                        if table.layout.operation == "concat":
                            e = torch.cat(found)
                        else:
                            e = found[0]
                            for other in found[1:]:
                                e = e * other if table.layout.operation == "mult" else e + other
                        out[b] += e * (float(self.id_weights[n]) if weighted else 1.0)
                    if table.mean:
                        out[b] /= max(end - begin, 1)
                columns.append(out)
        return torch.cat(columns, dim=1)


SPECS = {
    "plain": (None, "plain"),
    "qr_mult": (QuotientRemainder(num_collisions=4), "mult"),
    "qr_add": (QuotientRemainder(num_collisions=10), "add"),
    "qr_concat": (QuotientRemainder(num_collisions=4), "concat"),
    "three": (MixedRadix(sizes=[5, 5, 4]), "mult"),
    "three_concat": (MixedRadix(sizes=[5, 5, 4]), "concat"),
    "chinese": (ChineseRemainder(sizes=[10, 11]), "mult"),
    "hash": (HashPartition(rows=13), "add"),
    "explicit": (
        ExplicitPartitions([[i % 10 for i in range(S)], [i // 10 for i in range(S)]]),
        "mult",
    ),
}


@pytest.mark.parametrize("row_type", ROW_TYPES)
@pytest.mark.parametrize("dim", [12, 16, 32, 64, 128, 200])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_equals_sums_over_ids(row_type: str, dim: int, weighted: bool) -> None:
    tables = [
        (spec, operation, dim, 1 + number % 2, "error", number % 3 == 0, row_type)
        for number, (spec, operation) in enumerate(SPECS.values())
    ]
    case = Case(tables, seed=dim, policy_ids=False)
    arguments = case.arguments(weighted)
    out = torch.ops.torchrec_qr_serving.pooled(*arguments)
    torch.testing.assert_close(out.double(), case.expected(weighted), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled_by_torch(*arguments), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["clamp", "wrap"])
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_policies_bring_ids_into_range(policy: str, id_type: torch.dtype) -> None:
    tables = [(spec, operation, 16, 1, policy, False, "int8") for spec, operation in SPECS.values()]
    case = Case(tables, seed=1, policy_ids=True)
    case.ids = case.ids.to(id_type)
    case.lengths = case.lengths.to(torch.int32)
    out = torch.ops.torchrec_qr_serving.pooled(*case.arguments(False))
    torch.testing.assert_close(out.double(), case.expected(False), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled_by_torch(*case.arguments(False)), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x", [-1, S])
@pytest.mark.parametrize("of", [pooled_by_torch, torch.ops.torchrec_qr_serving.pooled])
def test_an_id_outside_is_an_error_that_names_it(x: int, of: Any) -> None:
    case = Case([(QuotientRemainder(num_collisions=4), "mult", 16, 2, "error", False, "int8")], 0, False)
    case.lengths, case.ids, case.bags = torch.tensor([0, 1, 2]), torch.tensor([3, 4, x]), 1
    case.order = [1, 2]
    with pytest.raises(RuntimeError, match=rf"table 't0', feature 'f0_1': id {x} is outside \[0, 97\)"):
        of(*case.arguments(False))


@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_any_ids_are_hashed(id_type: torch.dtype) -> None:
    tables = [
        (spec, operation, 16, 1, policy, False, "int8")
        for spec, operation in SPECS.values()
        if spec is not None
        for policy in ("hashed", "wrap")
    ]
    case = Case(tables, seed=1, policy_ids=True)
    limits = torch.iinfo(id_type)
    case.ids = torch.randint(limits.min, limits.max, case.ids.shape).to(id_type)
    case.ids[:4] = torch.tensor([limits.min, limits.max, -1, 0])
    out = torch.ops.torchrec_qr_serving.pooled(*case.arguments(False))
    torch.testing.assert_close(out.double(), case.expected(False), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled_by_torch(*case.arguments(False)), out, rtol=1e-5, atol=1e-5)


def test_seeds_that_are_none_are_refused() -> None:
    case = Case([(QuotientRemainder(num_collisions=4), "mult", 16, 1, "hashed", False, "int8")], 0, False)
    for at, number, message in [
        (9, -2, "table 't0': seed of a hash -2"),
        (9, 2**31, "table 't0': seed of a hash 2147483648"),
        (6, 0, "table 't0': seed of a hash, with policy 0"),
        (5, -1, "table 't0': seed of a hash, with policy 3"),
    ]:
        layout = case.layout.clone()
        layout[at] = number
        with pytest.raises(RuntimeError, match=message):
            torch.ops.torchrec_qr_serving.pooled(*broken(case, layout=layout))


def test_wild_ids_of_unchecked_tables_follow_the_formula() -> None:
    spec = QuotientRemainder(num_collisions=4)
    case = Case([(spec, "mult", 16, 1, "unchecked", False, "fp32")], 0, False)
    ids = torch.tensor([-1, S, 2**40, -(2**40), 7])
    out = torch.ops.torchrec_qr_serving.composed(case.weights, [], case.layout, case.names, ids, 16)
    layout = case.served[0].layout
    rows = [p.rows_of(ids, None) for p in layout.partitions]
    assert torch.equal(out, case.weights[0][rows[0]] * case.weights[1][rows[1]])


@pytest.mark.parametrize("row_type", ROW_TYPES)
@pytest.mark.parametrize("name", SPECS)
def test_composed_equals_the_rows(row_type: str, name: str) -> None:
    spec, operation = SPECS[name]
    case = Case([(spec, operation, 16, 1, "error", False, row_type)], 3, False)
    ids = torch.arange(S)
    arguments = (case.weights, case.maps, case.layout, case.names, ids, 16)
    out = torch.ops.torchrec_qr_serving.composed(*arguments)
    case.ids, case.lengths, case.order, case.bags = ids, torch.ones(S, dtype=torch.int64), [0], S
    assert torch.equal(out, torch.ops.torchrec_qr_serving.pooled(*case.arguments(False)))
    torch.testing.assert_close(composed_by_torch(*arguments), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_dequantised_rows_are_fbgemms(bits: int) -> None:
    rows = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(torch.randn(7, 20), bits)
    expected = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, bits)
    torch.testing.assert_close(dequantised_rows(rows, 20, bits), expected, rtol=1e-6, atol=1e-6)


def broken(case: Case, **changed: Any) -> tuple[Any, ...]:
    names = ["weights", "class_maps", "layout", "names", "ids", "lengths", "id_weights", "features", "bags", "columns"]
    return tuple({**dict(zip(names, case.arguments(False), strict=True)), **changed}.values())


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = Case([(QuotientRemainder(num_collisions=4), "mult", 16, 1, "error", False, "int8")], 0, False)
    wide = case.weights[0].expand(2, *case.weights[0].shape)
    for changed, message in [
        ({"columns": 17}, "columns: 17; allowed: 16"),
        ({"features": [0, 1]}, "features: 2; allowed: 1"),
        ({"features": [2]}, "features: 2; allowed: at least 0 and below 2"),
        ({"features": [-1]}, "features: -1"),
        ({"bags": 3}, "lengths: 10; allowed: a multiple"),
        ({"lengths": -torch.ones_like(case.lengths)}, "lengths: -1; allowed: 0 to"),
        ({"lengths": torch.zeros_like(case.lengths)}, "lengths: their sum is 0"),
        ({"ids": case.ids.float()}, "ids: allowed: a contiguous vector of int32 or int64"),
        ({"id_weights": torch.ones(1)}, "weights of ids"),
        ({"weights": case.weights[:1]}, "weights: there are 1, too few"),
        ({"weights": [*case.weights, case.weights[0]]}, "given: 3"),
        ({"weights": [case.weights[0][:, :10], case.weights[1]]}, "partition 0; allowed: rows on the CPU of type 5"),
        ({"weights": [wide[0].float(), case.weights[1]]}, "partition 0"),
        ({"weights": [case.weights[0][:3], case.weights[1]]}, "row"),
        ({"layout": case.layout[:-1].contiguous()}, "layout: it ends too early"),
        ({"layout": torch.cat([torch.tensor([1]), case.layout[1:]])}, "layout: version 1; allowed: 2"),
        ({"layout": case.layout.float()}, "layout: allowed"),
    ]:
        with pytest.raises(RuntimeError, match=message.replace("(", r"\(")):
            torch.ops.torchrec_qr_serving.pooled(*broken(case, **changed))


def test_an_empty_batch_has_no_rows() -> None:
    case = Case([(QuotientRemainder(num_collisions=4), "mult", 16, 1, "error", False, "int8")], 0, False)
    nothing = torch.zeros(0, dtype=torch.int64)
    arguments = broken(case, bags=0, ids=nothing, lengths=nothing)
    assert torch.ops.torchrec_qr_serving.pooled(*arguments).shape == pooled_by_torch(*arguments).shape == (0, 16)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_bags_take_several_threads(threads: int) -> None:
    case = Case([(spec, op, 64, 1, "error", False, "int8") for spec, op in SPECS.values()], 0, False)
    case.bags = 3000
    case.lengths = torch.randint(0, 3, (10 * case.bags,))
    case.ids = torch.randint(0, S, (int(case.lengths.sum()),))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = torch.ops.torchrec_qr_serving.pooled(*case.arguments(False))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(pooled_by_torch(*case.arguments(False)), out, rtol=1e-5, atol=1e-5)


def test_the_operators_pass_torchs_own_checks() -> None:
    case = Case([(QuotientRemainder(num_collisions=4), "mult", 16, 1, "error", False, "int8")], 0, False)
    torch.library.opcheck(torch.ops.torchrec_qr_serving.pooled.default, case.arguments(True))
    arguments = (case.weights, [], case.layout, case.names, torch.tensor([1, 2]), 16)
    torch.library.opcheck(torch.ops.torchrec_qr_serving.composed.default, arguments)


def test_the_library_holds_no_path_and_needs_torch_alone() -> None:
    text = operators_library().read_bytes()
    assert b"/include/torch" not in text
    assert b"libgomp" not in text


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [1, 2, 3, 6])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows_of_any_width_and_number_are_dequantised(rows: int, width: int, bits: int) -> None:
    """Scale and bias may lie at an odd address, and the last value of 4 bits may have a byte for itself."""
    whole = 16 // bits  # FBGEMM writes pairs of bytes
    values = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(torch.randn(rows, 4 * whole), bits)
    end = -(-width * bits // 8)
    expected = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(values, bits)[:, :width]
    stored = torch.cat([values[:, :end], values[:, -4:]], dim=1)
    torch.testing.assert_close(dequantised_rows(stored, width, bits), expected, rtol=1e-6, atol=1e-6)
