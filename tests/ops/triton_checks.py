"""Tests of the Triton kernels on the CPU; see `triton_cases`, which runs them."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import oracle
import pytest
import torch
from kernel_reference import RULES, SEED, StepCase, one_table, rule_of, train, update_of
from near import assert_near
from torch import Tensor

from torchrec_qr.ops import operators
from torchrec_qr.ops.arguments import Batch, DenseGradient, Outcome, Replica, SentFeature
from torchrec_qr.ops.backends import cpu, triton
from torchrec_qr.ops.description import CodeLayout, Description, PartitionLayout, TableLayout
from torchrec_qr.ops.lookup_warm_up import launch_every_kernel
from torchrec_qr.ops.triton_kernels import backward_launches, launches
from torchrec_qr.ops.triton_kernels.device_tables import Stored, describe
from torchrec_qr.ops.update_rules import Sgd, Update

# Without weight decay, and with that of either mode.
DECAYS = ((0.0, "l2"), (0.25, "l2"), (0.25, "decoupled"))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, case: StepCase, step: int, ids: Tensor, offsets: Tensor, w: Tensor | None, *weights: Tensor
    ) -> Tensor:
        ctx.given = case.tables, [t.data for t in weights], Batch(ids, offsets, w, True)
        ctx.updates = case.updates(step)
        return triton.forward(*ctx.given)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found = triton.backward(*ctx.given, gradient, ctx.updates, ctx.needs_input_grad[4])
        return None, None, None, None, found.id_weights, *found.weights


class StepThroughTriton(StepCase):
    def look_up(self, ids: Tensor, offsets: Tensor, id_weights: Tensor | None, step: int) -> Tensor:
        return _Lookup.apply(self, step, ids, offsets, id_weights, *self.stored)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def several_steps() -> None:
    """Of many rows most stay untouched, though their state would move them."""
    case = StepThroughTriton("wide", 2, dim=4, rule="amsgrad", num_bags=2)
    before = [w.detach().clone() for w in case.stored]
    train(case, 2e-5, 2)
    for w, b, exact in zip(case.stored, before, case.exact, strict=True):
        stay = (exact == b.double()).all(dim=1)
        assert stay.sum() > 250
        assert torch.equal(w.detach()[stay], b[stay])


def hot_rows() -> None:
    """Nine tenths of the ids are one, enough of them that rows are cut: against the float64 reference."""
    train(StepThroughTriton("strided", 2, dim=8, rule="adagrad", num_bags=2, hot=True), 2e-5, 1)


def hot_rows_of_every_shape() -> None:
    """Small cuts, and rows that end on them, one before and one after; whole supers, of one row and of several."""
    lengths = [1, 3, 4, 5, 8, 9, 7, 16, 40, 1, 1, 2, 33, 24, 8, 64]
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    weights = [torch.randn(len(lengths), 4), torch.randn(1, 4)]
    partitions = PartitionLayout(4, 1, len(lengths)), PartitionLayout(4, len(lengths), 1)
    gradient = torch.randn(len(rows), 4)
    for operation, factors in (("add", [torch.ones(1, 4)] * 2), ("mult", [weights[1], weights[0][rows]])):
        table = TableLayout(operation, partitions, num_ids=len(lengths))
        d = describe(Description([table], ["t"]), [Stored.of(w) for w in weights], [], weights[0].device)
        of_rows = torch.zeros(len(lengths), 4, dtype=torch.float64)
        of_rows.index_add_(0, rows, (gradient * factors[0]).double())
        expected = of_rows, (gradient * factors[1]).double().sum(0, keepdim=True)
        in_order, mixed = torch.arange(len(rows)), torch.randperm(len(rows))
        for order, (chunk, supers) in ((in_order, (4, 2)), (mixed, (8, 4)), (mixed, (4, 32))):
            cuts = backward_launches.Cuts(chunk, supers)
            batch = launches.batch_of(d, rows[order], ints(0, len(rows)), None, False)
            dense = [torch.zeros_like(w) for w in weights]
            stepping = backward_launches.stepping_of(weights, [backward_launches.GRADIENT] * 2, [[], []], d)
            step = backward_launches.Step(list(dense), [None, None], [0.0] * 14)
            backward_launches.step_looked_up_rows(d, batch, gradient[order].flatten(), stepping, step, cuts)
            for actual, exact in zip(dense, expected, strict=True):
                assert_near(actual, exact, 1e-5, f"{operation}, {cuts}")


QR = (PartitionLayout(8, 1, 5), PartitionLayout(8, 5, 3))


def two_tables() -> tuple[Description, list[Tensor], Batch]:
    """A product of two partitions over two features, and a concatenation of two widths; ids and weights."""
    pair = (PartitionLayout(4, 3, 5), PartitionLayout(8, 1, 3))
    layouts = [TableLayout("mult", QR, 2, 15), TableLayout("concat", pair, 1, 15)]
    weights = [torch.randn(r, w) for r, w in ((5, 8), (3, 8), (5, 4), (3, 8))]
    ids = torch.randint(0, 15, (23,))
    batch = Batch(ids, ints(0, 3, 3, 8, 14, 15, 23), torch.rand(23), True)
    return Description(layouts, ["a", "b"]), weights, batch


def gradients_that_share_memory() -> None:
    """Dense gradients of one type are in one memory. `torch.library` allows that of no operator."""
    tables, weights, batch = two_tables()
    types = torch.float32, torch.float16, torch.float32, torch.float32
    weights = [w.to(of_type) for w, of_type in zip(weights, types, strict=True)]
    gradient = torch.randn(2, tables.columns)
    outcomes: list[Outcome] = [DenseGradient(), DenseGradient(), None, DenseGradient()]
    expected = cpu.backward(tables, weights, batch, gradient, outcomes, False).weights
    shared = triton.backward(tables, weights, batch, gradient, outcomes, False).weights
    of_batch, needed = (batch.ids, batch.offsets, batch.weights), [True, True, False, True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "kernels_on", lambda device: triton)
        own = operators.lookup_gradients_op(gradient, weights, [], *of_batch, tables.text, True, needed, False)
    for i in (0, 1, 3):
        assert shared[i].data_ptr() % 16 == 0
        for actual in (shared[i], own[i]):
            assert actual.dtype == weights[i].dtype
            assert_near(actual.double(), expected[i].double(), 1e-2 if i == 1 else 1e-6, str(i))
    for of, storages in ((shared, 2), (own, 3)):
        assert len({of[i].untyped_storage().data_ptr() for i in (0, 1, 3)}) == storages


def dense_gradients_and_touched_rows() -> None:
    """Every kind of outcome in one call, as the CPU kernels have it."""
    tables, weights, batch = two_tables()
    gradient = torch.randn(2, tables.columns)
    results = []
    for backend in (cpu, triton):
        own, touched = [w.clone() for w in weights], torch.zeros(5, dtype=torch.uint8)
        adam = update_of(rule_of("adam"), own[1], t=3)
        outcomes: list[Outcome] = [DenseGradient(touched), adam, None, Update(Sgd(), {}, 0.1)]
        found = backend.backward(tables, own, batch, gradient, outcomes, True)
        assert [g is None for g in found.weights] == [False, True, True, True]
        results.append([*own, *adam.state.values(), touched, found.weights[0], found.id_weights])
    for i, (actual, expected) in enumerate(zip(results[1], results[0], strict=True)):
        assert_near(actual, expected, 1e-5, f"number {i}")


def sequences() -> None:
    """Not pooled: tables of one width, whose output's size the ids give, and of two."""
    tables, weights, batch = two_tables()
    offsets = ints(0, 8, 15, 23)
    one_width = Description([TableLayout("mult", QR, 3, 15)], ["a"])
    for own, of_tables in ((weights, tables), (weights[:2], one_width)):
        for given in (batch.ids, batch.ids.to(torch.int32)):
            of = Batch(given, offsets, None, False)
            out = triton.forward(of_tables, own, of)
            assert torch.equal(out, cpu.forward(of_tables, own, of))
        gradient, dense = torch.randn(out.shape), [DenseGradient()] * len(own)
        actual, expected = (b.backward(of_tables, own, of, gradient, dense, False).weights for b in (triton, cpu))
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, 1e-5)


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
        tables = Description([table], ["t"])
        assert_near(triton.forward(tables, weights, batch), cpu.forward(tables, weights, batch), 1e-6)


def rows_given() -> None:
    """Steps of rows whose gradients came another way."""
    rows, gradients = ints(3, 0, 4), torch.randn(3, 8)
    for rule, decay in product(RULES, DECAYS):
        results = []
        for backend in (cpu, triton):
            weight = torch.linspace(-1, 1, 40).view(5, 8).to(torch.float16)
            update = update_of(rule_of(rule, 0.5, *decay), weight, lr=0.1, fill=0.5)
            backend.update_rows(weight, rows, gradients, update)
            results.append([weight, *update.state.values()])
        for actual, expected in zip(results[1], results[0], strict=True):
            assert_near(actual, expected, 1e-3 if actual.dtype == torch.float16 else 1e-5, rule)


def replicas_given() -> None:
    """Rows that were looked up move, or those with a gradient, of two widths in one call; masks are cleared."""
    for rule, decay in product(RULES, DECAYS):
        given: list[Replica] = []
        expected: list[list[torch.Tensor]] = []
        for rows, width, dtype in ((5, 8, torch.float16), (70, 8, torch.float16), (3, 12, torch.float32)):
            weight, gradient = torch.randn(rows, width).to(dtype), torch.randn(rows, width)
            gradient[::2] = 0
            update = update_of(rule_of(rule, 0.5, *decay), weight, lr=0.1, fill=0.5)
            masks = [None, None]
            stepped = gradient.ne(0).any(dim=1)
            if update.rule.moves_without_gradient:
                stepped = torch.arange(rows) % 3 == 0
                masks = [stepped.to(torch.uint8), (torch.arange(rows) % 6 == 0).to(torch.uint8)]
            given.append(Replica(weight, gradient, update, *masks))
            state = {name: value.clone() for name, value in update.state.items()}
            copied = Replica(weight.clone(), gradient, update._replace(state=state))
            picked = stepped.nonzero().squeeze(1)
            cpu.update_rows(copied.weight, picked, gradient[picked], copied.update)
            expected.append([copied.weight, *state.values()])
        triton.update_replicas(given)
        for replica, exact in zip(given, expected, strict=True):
            for actual, of in zip([replica.weight, *replica.update.state.values()], exact, strict=True):
                assert_near(actual, of, 1e-3 if actual.dtype == torch.float16 else 1e-5, rule)
            assert replica.mask is None or not replica.mask.any()


def ids_that_are_sent() -> None:
    """Each feature by its own policy and code; the code's base row is the id's, and its inverse the id."""
    num_ids, base = 1000, torch.arange(1000) * 7 % 1000 % 40
    codes = {
        "strided": CodeLayout(4, 1, 300, 0),
        "adjacent": CodeLayout(7, 7, 143, 0),
        "wide": CodeLayout(1000, 0, 0, 0),
        "narrow": CodeLayout(1000, 0, 0, 0),
    }
    maps = {"wide": base, "narrow": base.to(torch.int32)}
    hashed = oracle.hashed(lambda x: (x,), num_ids, SEED)
    allowed = {"clamp": lambda x: min(max(x, 0), num_ids - 1), "wrap": lambda x: x % num_ids}
    for dtype in (torch.int64, torch.int32):
        features = [SentFeature(num_ids, policy) for policy in ("unchecked", "clamp", "wrap")]
        features += [SentFeature(num_ids, p, codes[kind], maps.get(kind)) for p in allowed for kind in codes]
        features += [SentFeature(num_ids, "unchecked", codes[kind], maps.get(kind), SEED) for kind in codes]
        of_feature = [-5, 0, 999, 1000, 2**31 - 1, *range(0, 999, 3)]
        ids, bags = ints(*of_feature * len(features)).to(dtype), len(of_feature) // 2
        offsets = torch.cat([torch.arange(0, len(ids), len(of_feature)).view(-1, 1) + ints(*range(bags))]).flatten()
        offsets = torch.cat([offsets, ints(len(ids))])
        fields = triton.fields_of_sent(features)
        sent = triton.send_ids(fields, ids, offsets, len(of_feature), pytest.fail).view(len(features), -1)
        assert sent.dtype == torch.int64
        for feature, actual in zip(features, sent, strict=True):
            bounded = allowed.get(feature.out_of_range, int)
            expected = [bounded(x) if feature.hash_seed is None else hashed(x)[0] for x in of_feature]
            if feature.code is None:
                assert actual.tolist() == expected
                continue
            stride, size = feature.code.stride or 1, feature.code.size or num_ids
            of_map = feature.class_map
            rows = [x // stride % size for x in expected] if of_map is None else of_map[expected].tolist()
            assert (actual // feature.code.per_row).tolist() == rows
            assert feature.code.ids_of(actual).tolist() == expected


def ids_that_are_refused() -> None:
    """The first id outside its table is the one that is reported; nothing is read past the end of a map."""
    features = [SentFeature(9, "unchecked"), SentFeature(5, "error", CodeLayout(5, 0, 0, 0), torch.arange(5) % 2)]
    fields = triton.fields_of_sent(features)
    for bad in (-1, 5, 2**62, -(2**63)):
        refused: list[int] = []
        triton.send_ids(fields, ints(bad, 4, 4, bad, bad), ints(0, 2, 5), 3, refused.append)
        assert refused == [3]


def any_id() -> None:
    """Rows are those of Python's // and %, of the largest and least ids too."""
    weight, ids = torch.arange(20.0).view(5, 4), ints(-1, -3, -4, 2**63 - 1, -(2**63), 14, 2**40)
    batch = Batch(ids, ints(0, len(ids)), None, False)
    for divisor in (1, 3, 2**33 + 1):
        tables = Description([TableLayout("add", (PartitionLayout(4, divisor, 5),), num_ids=-1)], ["t"])
        out = triton.forward(tables, [weight], batch)
        assert torch.equal(out.view(-1, 4), weight[ids // divisor % 5])


def ids_out_of_range() -> None:
    """Refused as on the CPU, in either direction, with nothing read or moved."""
    tables, (weight,) = one_table()
    before = weight.clone()
    for bad in (-1, 5, 2**62, -(2**63)):
        batch = Batch(ints(0, 4, bad, 1), ints(0, 4), None, True)
        with pytest.raises(IndexError, match=rf"table 't': id {bad} \(number 2\) is out of range \[0, 5\)"):
            triton.forward(tables, [weight], batch)
    with pytest.raises(IndexError, match="number 2"):
        triton.backward(tables, [weight], batch, torch.ones(1, 4), [Update(Sgd(), {}, 0.1)], False)
    expected = before - torch.tensor([0.1, 0.1, 0.0, 0.0, 0.1]).unsqueeze(1)
    assert_near(weight, expected, 1e-6, "only rows of ids move")
    block = Description([TableLayout("add", (PartitionLayout(4, 1, 10, first_row=5),), num_ids=10)], ["t"])
    with pytest.raises(IndexError, match="table 't': id number 1 has row -1 of partition 0"):
        triton.forward(block, [weight], Batch(ints(5, 4), ints(0, 2), None, True))


def ids_out_of_range_of_named_features() -> None:
    tables, weights, _ = two_tables()
    named = Description(tables.tables, tables.names, features=["f", "g", "h"])
    for number, label in enumerate(("table 'a', feature 'f'", "table 'a', feature 'g'", "table 'b', feature 'h'")):
        ids = ints(*(99 if i == number else 0 for i in range(3)))
        with pytest.raises(IndexError, match=rf"{label}: id 99 \(number {number}\) is out of range \[0, 15\)"):
            triton.forward(named, weights, Batch(ids, ints(0, 1, 2, 3), None, True))


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
            triton.forward(tables, [weight], Batch(ints(0, 1, 2), offsets, None, True))


def nothing_to_look_up() -> None:
    tables, (weight,) = one_table()
    for offsets, pooled, shape in ((ints(0), True, (0, 4)), (ints(0, 0, 0), True, (2, 4)), (ints(0, 0), False, (0,))):
        batch = Batch(ints(), offsets, None, pooled)
        out = triton.forward(tables, [weight], batch)
        assert torch.equal(out, torch.zeros(shape))
        (gradient,) = triton.backward(tables, [weight], batch, out, [DenseGradient()], False).weights
        assert torch.equal(gradient, torch.zeros(5, 4))


def every_warm_up_changes_nothing() -> None:
    a_warm_up_changes_nothing(["sgd", "adagrad", "rowwise_adagrad", "adam", "amsgrad", "partial_rowwise_lamb"])


def a_warm_up_changes_nothing(rules: Sequence[str] = ("amsgrad",)) -> None:
    """Neither weights nor states nor marks move, and no error is raised of ids that the table lacks."""
    for rule in rules:
        for pooled in (True, False):
            tables, weights, _ = two_tables()
            updates = [update_of(rule_of(rule), w, fill=0.5) for w in weights[:3]]
            touched = torch.zeros(len(weights[3]), dtype=torch.uint8)
            held = [*weights, *(s for u in updates for s in u.state.values()), touched]
            before = [t.clone() for t in held]
            launch_every_kernel(tables, weights, [*updates, DenseGradient(touched)], pooled, weighted=True)
            assert all(map(torch.equal, held, before)), rule
    empty = Description([TableLayout("add", (PartitionLayout(4, 1, 2),), num_ids=0)], ["t"])
    launch_every_kernel(empty, [torch.ones(2, 4)], [DenseGradient()], True, False)
