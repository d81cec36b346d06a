"""Tests of the Triton kernels on the CPU; see `triton_cases`, which runs them."""

from typing import Any

import pytest
import torch
from kernel_reference import StepCase, one_table
from torch import Tensor

from torchrec_qr.ops import cpu, triton
from torchrec_qr.ops.arguments import GRADIENT, NOTHING, RULES, Batch, Gradients, num_states
from torchrec_qr.ops.layout import CodeLayout, PartitionLayout, TableLayout, encode
from torchrec_qr.ops.lookup import Lookup
from torchrec_qr.ops.triton_kernels import run
from torchrec_qr.ops.triton_kernels.tables import Partition, Stored, Table, describe
from torchrec_qr.ops.warm_up import launch_every_kernel


def close(actual: Tensor, expected: Tensor, rtol: float, what: str = "values") -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=rtol * scale + 1e-12, msg=lambda m: f"{what}: {m}"
    )


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, case: StepCase, steps: Gradients, ids: Tensor, offsets: Tensor, w: Tensor | None, *weights: Tensor
    ) -> Tensor:
        ctx.rest = [t.data for t in weights], case.lookup.class_maps, Batch(ids, offsets, w, True)
        ctx.layout, ctx.steps = case.lookup.layout, steps
        return triton.look_up(*ctx.rest, ctx.layout, "a\nb")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        steps, weighted = ctx.steps, ctx.needs_input_grad[4]
        gradients = Gradients(steps.rules, steps.states, steps.hyper, steps.touched)
        out = triton.propagate(gradient, *ctx.rest, ctx.layout, "a\nb", gradients, weighted)
        return None, None, None, None, out[-1] if weighted else None, *[None] * (len(out) - 1)


class StepThroughTriton(StepCase):
    def look_up(self, ids: Tensor, offsets: Tensor, id_weights: Tensor | None, step: int) -> Tensor:
        return _Lookup.apply(self, self.steps(step), ids, offsets, id_weights, *self.stored)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def train(case: StepCase, steps: int, rtol: float) -> None:
    """Steps as the reference does, and compares all that there is."""
    for step in range(steps):
        out, expected, gradient, exact = case.run(step)
        close(out, expected, rtol, f"step {step}: output")
        if gradient is not None and exact is not None:
            close(gradient, exact, rtol, f"step {step}: gradient of the weights")
    for i, (w, of_weight) in enumerate(zip(case.stored, case.exact, strict=True)):
        close(w.detach(), of_weight.detach(), rtol, f"weight {i}")
        for name, state in case.states[i].items():
            close(state, case.exact_states[i][name], rtol, f"state {name} of weight {i}")


def several_steps() -> None:
    """Of many rows most stay untouched, though their state would move them."""
    case = StepThroughTriton("wide", 2, dim=4, rule="amsgrad", num_bags=2)
    before = [w.detach().clone() for w in case.stored]
    train(case, 2, 2e-5)
    for w, b, exact in zip(case.stored, before, case.exact, strict=True):
        stay = (exact == b.double()).all(dim=1)
        assert stay.sum() > 250
        assert torch.equal(w.detach()[stay], b[stay])


def hot_rows() -> None:
    """Nine tenths of the ids are one, enough of them that rows are cut: against the float64 reference."""
    train(StepThroughTriton("strided", 2, dim=8, rule="adagrad", num_bags=2, hot=True, pooling="mean"), 1, 2e-5)


def hot_rows_of_every_shape() -> None:
    """Small cuts, and rows that end on them, one before and one after; whole supers, of one row and of several."""
    lengths = [1, 3, 4, 5, 8, 9, 7, 16, 40, 1, 1, 2, 33, 24, 8, 64]
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    weight = torch.randn(len(lengths), 4)
    table = Table("add", (Partition(Stored.of(weight), 1, len(lengths)),), num_ids=len(lengths))
    d = describe((table,), weight.device)
    gradient = torch.randn(len(rows), 4)
    expected = torch.zeros(len(lengths), 4, dtype=torch.float64).index_add_(0, rows, gradient.double())
    for order in (torch.arange(len(rows)), torch.randperm(len(rows))):
        for cuts in (run.Cuts(4, 2), run.Cuts(8, 4)):
            batch = run.batch_of(d, rows[order], ints(0, len(rows)), None, False)
            sums = run.sum_rows(d, batch, gradient[order].flatten(), 0, [True], cuts)
            found, of_rows = run.unique_rows(d, [sums], 0)
            assert torch.equal(found, torch.arange(len(lengths)))
            close(of_rows, expected, 1e-5, f"{cuts}")


def two_tables() -> tuple[list[Tensor], list[int], Batch, int]:
    """A product of two partitions over two features, and a concatenation of two widths; ids, weights, MEAN."""
    qr = (PartitionLayout(8, 1, 5), PartitionLayout(8, 5, 3))
    pair = (PartitionLayout(4, 3, 5), PartitionLayout(8, 1, 3))
    layout = [TableLayout("mult", qr, 2, 15, mean=True), TableLayout("concat", pair, 1, 15)]
    weights = [torch.randn(r, w) for r, w in ((5, 8), (3, 8), (5, 4), (3, 8))]
    ids = torch.randint(0, 15, (23,))
    return weights, encode(layout), Batch(ids, ints(0, 3, 3, 8, 14, 15, 23), torch.rand(23), True), 28


def dense_gradients_and_touched_rows() -> None:
    """Every kind of rule in one call, as the CPU kernels have it."""
    weights, layout, batch, columns = two_tables()
    gradient = torch.randn(2, columns)
    rules = [GRADIENT, 4, NOTHING, 1]
    results = []
    for backend in (cpu, triton):
        own = [w.clone() for w in weights]
        states = [torch.zeros(3, 8), torch.zeros(3, 8)]
        touched = [torch.zeros(5, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]
        touched += [torch.empty(0, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)]
        numbers = [0.1, 1e-3, 0.9, 0.99, 0.1, 0.01, -1.0] * 4
        gradients = Gradients(rules, states, numbers, touched)
        out = backend.propagate(gradient, own, [], batch, layout, "a\nb", gradients, True)
        results.append([*own, *states, *touched, *out])
    for i, (actual, expected) in enumerate(zip(results[1], results[0], strict=True)):
        close(actual, expected, 1e-5, f"number {i}")


def unique_rows() -> None:
    weights, layout, batch, columns = two_tables()
    gradient = torch.randn(2, columns)
    found = triton.unique_gradients(gradient, weights, [], batch, layout, "a\nb")
    dense = cpu.propagate(gradient, weights, [], batch, layout, "a\nb", Gradients([GRADIENT] * 4, [], [], []), False)
    for (rows, of_rows), of_all in zip(found, dense, strict=False):
        assert torch.equal(rows, of_all.abs().sum(dim=1).nonzero().squeeze(1))
        close(of_rows, of_all[rows], 1e-5)


def sequences() -> None:
    """Not pooled: tables of one width, whose output's size the ids tell, and of two."""
    weights, layout, batch, _ = two_tables()
    offsets = ints(0, 8, 15, 23)
    one_width = encode([TableLayout("mult", (PartitionLayout(8, 1, 5), PartitionLayout(8, 5, 3)), 3, 15)])
    for own, of_layout in ((weights, layout), (weights[:2], one_width)):
        names = "a\nb"[: len(own) - 1]
        for given in (batch.ids, batch.ids.to(torch.int32)):
            of = Batch(given, offsets, None, False)
            out = triton.look_up(own, [], of, of_layout, names)
            assert torch.equal(out, cpu.look_up(own, [], of, of_layout, names))
        gradient = torch.randn(out.shape)
        rules = Gradients([GRADIENT] * len(own), [], [], [])
        actual = triton.propagate(gradient, own, [], of, of_layout, names, rules, False)
        for a, e in zip(actual, cpu.propagate(gradient, own, [], of, of_layout, names, rules, False), strict=True):
            close(a, e, 1e-5)


def codes() -> None:
    """Blocks of rows, of either grouping: what travels is a code; and a slice of a wider weight."""
    strided = TableLayout(
        "mult", (PartitionLayout(4, 1, 10, 5), PartitionLayout(4, 10, 3)), num_ids=30, code=CodeLayout(3, 1, 10, 5)
    )
    adjacent = TableLayout(
        "add", (PartitionLayout(4, 3, 10, 5), PartitionLayout(4, 1, 3)), num_ids=30, code=CodeLayout(3, 3, 10, 5)
    )
    wide = torch.randn(5, 12)
    weights = [wide[:, 4:8], torch.randn(3, 4)]
    batch = Batch(torch.arange(15), ints(0, 4, 15), None, True)
    for table in (strided, adjacent):
        out = triton.look_up(weights, [], batch, encode([table]), "t")
        close(out, cpu.look_up(weights, [], batch, encode([table]), "t"), 1e-6)


def rows_given() -> None:
    """Steps of rows whose gradients came another way."""
    rows, gradients = ints(3, 0, 4), torch.randn(3, 8)
    for rule, number in RULES.items():
        results = []
        for backend in (cpu, triton):
            weight = torch.linspace(-1, 1, 40).view(5, 8).to(torch.float16)
            shape = (5,) if rule == "rowwise_adagrad" else (5, 8)
            states = [torch.full(shape, 0.5) for _ in range(num_states(number))]
            backend.step_rows(weight, rows, gradients, rule, states, [0.1, 1e-3, 0.9, 0.99, 0.1, 0.01, 0.5])
            results.append([weight, *states])
        for actual, expected in zip(results[1], results[0], strict=True):
            close(actual, expected, 1e-3 if actual.dtype == torch.float16 else 1e-5, rule)


def any_id() -> None:
    """Rows are those of Python's // and %, of the largest and least ids too."""
    weight, ids = torch.arange(20.0).view(5, 4), ints(-1, -3, -4, 2**63 - 1, -(2**63), 14, 2**40)
    batch = Batch(ids, ints(0, len(ids)), None, False)
    for divisor in (1, 3, 2**33 + 1):
        layout = encode([TableLayout("add", (PartitionLayout(4, divisor, 5),), num_ids=-1)])
        out = triton.look_up([weight], [], batch, layout, "t")
        assert torch.equal(out.view(-1, 4), weight[ids // divisor % 5])


def ids_out_of_range() -> None:
    """Refused as on the CPU, in either direction, with nothing read or moved."""
    tables, (weight,) = one_table()
    before = weight.clone()
    for bad in (-1, 5, 2**62, -(2**63)):
        batch = Batch(ints(0, 4, bad, 1), ints(0, 4), None, True)
        with pytest.raises(IndexError, match=rf"table 't': id {bad} \(number 2\) is out of range \[0, 5\)"):
            triton.look_up([weight], [], batch, tables.layout, "t")
    step = Gradients([1], [], [0.1, 0.0, 0.0, 0.0, 1.0, 1.0, -1.0], [])
    with pytest.raises(IndexError, match="number 2"):
        triton.propagate(torch.ones(1, 4), [weight], [], batch, tables.layout, "t", step, False)
    expected = before - torch.tensor([0.1, 0.1, 0.0, 0.0, 0.1]).unsqueeze(1)
    close(weight, expected, 1e-6, "only rows of ids move")
    block = encode([TableLayout("add", (PartitionLayout(4, 1, 10, first_row=5),), num_ids=10)])
    with pytest.raises(IndexError, match="table 't': id number 1 has row -1 of partition 0"):
        triton.look_up([weight], [], Batch(ints(5, 4), ints(0, 2), None, True), block, "t")


def offsets_that_do_not_cover_the_ids() -> None:
    tables, (weight,) = one_table()
    for offsets, message in (
        (ints(0, 2), r"offsets\[1\] = 2; allowed: offsets from 0 to the number of ids, 3"),
        (ints(0, 4), r"offsets\[1\] = 4"),
        (ints(1, 3), r"offsets\[0\] = 1"),
        (ints(0, 2, 1, 3), r"offsets\[2\] = 1 is less than the offset before it"),
        (ints(-1, 3), r"offsets\[0\] = -1 is less"),
        (ints(0, 2**40, 3), r"offsets\[1\] = 1099511627776"),
    ):
        with pytest.raises(ValueError, match=message):
            triton.look_up([weight], [], Batch(ints(0, 1, 2), offsets, None, True), tables.layout, "t")


def nothing_to_look_up() -> None:
    tables, (weight,) = one_table()
    rule = Gradients([GRADIENT], [], [], [])
    for offsets, pooled, shape in ((ints(0), True, (0, 4)), (ints(0, 0, 0), True, (2, 4)), (ints(0, 0), False, (0,))):
        batch = Batch(ints(), offsets, None, pooled)
        out = triton.look_up([weight], [], batch, tables.layout, "t")
        assert torch.equal(out, torch.zeros(shape))
        gradient, _ = triton.propagate(out, [weight], [], batch, tables.layout, "t", rule, False)
        assert torch.equal(gradient, torch.zeros(5, 4))


def a_warm_up_changes_nothing() -> None:
    """Neither weights nor states nor marks move, and nothing is said of ids that the table lacks."""
    for rule, number in RULES.items():
        for pooled in (True, False):
            weights, layout, _, _ = two_tables()
            shapes = [w.shape[:1] if rule == "rowwise_adagrad" else w.shape for w in weights[:3]]
            states = [torch.full(s, 0.5) for s in shapes for _ in range(num_states(number))]
            touched = [torch.zeros(len(w), dtype=torch.uint8) for w in weights]
            steps = Gradients([number] * 3 + [GRADIENT], states, [0.1, 1e-3, 0.9, 0.99, 0.1, 0.01, -1.0] * 4, touched)
            held = [*weights, *states, *touched]
            before = [t.clone() for t in held]
            launch_every_kernel(Lookup(layout, ["a", "b"], []), weights, steps, pooled, weighted=True)
            assert all(map(torch.equal, held, before)), rule
    weight, empty = torch.ones(2, 4), encode([TableLayout("add", (PartitionLayout(4, 1, 2),), num_ids=0)])
    launch_every_kernel(Lookup(empty, ["t"], []), [weight], Gradients([GRADIENT], [], [0.0] * 7, []), True, False)
