"""Bags of any length, partitions of mixed types, and widths that fill no vector, against plain sums over ids."""

import itertools

import pytest
import torch

from tests.ops.test_served_operators import SPECS, Case, S, read, stored
from torchrec_qr import MixedRadix, QuotientRemainder
from torchrec_qr.ops.description import PartitionLayout, TableLayout
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.ops.served_operators import ROW_TYPES, ServedTable, served_layout
from torchrec_qr.ops.serving_library import load_operators

pytestmark = pytest.mark.skipif(not load_operators(), reason="the operators' library was not built")
FOUR = (MixedRadix(sizes=[4, 3, 3, 3]), "add")
# Rows are found 16 ids ahead, and pooled 16 at a time.
LENGTHS = [0, 70, 1, 15, 16, 17, 0, 31, 32, 33, 0]


@pytest.mark.parametrize("row_type", ROW_TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_of_any_length(row_type: str, weighted: bool) -> None:
    tables = [
        (spec, operation, 16 if number % 2 else 68, 1, "error", number % 3 == 0, row_type)
        for number, (spec, operation) in enumerate([*SPECS.values(), FOUR])
    ]
    case = Case(tables, seed=1, policy_ids=False)
    generator = torch.Generator().manual_seed(2)
    case.bags = len(LENGTHS)
    case.lengths = torch.tensor([LENGTHS[n:] + LENGTHS[:n] for n in range(len(tables) + 1)]).flatten()
    case.ids = torch.randint(0, S, (int(case.lengths.sum()),), generator=generator)
    case.id_weights = torch.rand(case.ids.numel(), generator=generator)
    out = torch.ops.torchrec_qr_serving.pooled(*case.arguments(weighted))
    torch.testing.assert_close(out.double(), case.expected(weighted), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("types", list(itertools.permutations(ROW_TYPES, 2)))
@pytest.mark.parametrize("operation", ["mult", "concat"])
def test_partitions_of_mixed_types(types: tuple[str, str], operation: str) -> None:
    bound = QuotientRemainder(num_collisions=10).bind(S)
    widths = [24, 24] if operation == "mult" else [24, 12]
    layout = TableLayout(operation, partition_layouts(bound, dict(enumerate(widths))))
    weights = [stored(torch.randn(n, d), t) for n, d, t in zip(bound.sizes, widths, types, strict=True)]
    numbers, names = served_layout([ServedTable("t", ("f",), layout, S, "error", False, types)])
    ids = torch.arange(S)
    out = torch.ops.torchrec_qr_serving.composed(weights, [], numbers, names, ids, layout.dim)
    rows = bound.rows(ids)
    parts = [read(w, t, d)[rows[:, j]] for j, (w, t, d) in enumerate(zip(weights, types, widths, strict=True))]
    expected = parts[0] * parts[1] if operation == "mult" else torch.cat(parts, dim=1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("row_type", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 15, 17, 33, 63, 131])
def test_quantised_rows_of_any_width(row_type: str, bits: int, width: int) -> None:
    """Scale and bias may lie at an odd address, and the last value of 4 bits may have a byte for itself."""
    whole = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(torch.randn(5, 132), bits)
    expected = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(whole, bits)[:, :width]
    weight = torch.cat([whole[:, : -(-width * bits // 8)], whole[:, -4:]], dim=1)
    layout = TableLayout("plain", (PartitionLayout(width, divisor=1),))
    numbers, names = served_layout([ServedTable("t", ("f",), layout, 5, "error", False, (row_type,))])
    out = torch.ops.torchrec_qr_serving.composed([weight], [], numbers, names, torch.arange(5), width)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_threads_give_the_same_bits() -> None:
    case = Case([(spec, op, 64, 1, "error", True, "int8") for spec, op in SPECS.values()], 0, False)
    case.bags = 2000
    case.lengths = torch.randint(0, 40, ((len(SPECS) + 1) * case.bags,))
    case.ids = torch.randint(0, S, (int(case.lengths.sum()),))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.ops.torchrec_qr_serving.pooled(*case.arguments(False)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, found[0]) for out in found)
