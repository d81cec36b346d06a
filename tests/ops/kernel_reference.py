"""The reference of a stepped lookup, in float64 and a few obvious lines: compose, weight, pool and step."""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import oracle
import torch
from kinds import Kind, kind_of
from near import assert_near
from optimizer_reference import BETA1, BETA2, OptimizerReference, gradient_of, zero_state
from torch import Tensor

from torchrec_qr import MixedRadix
from torchrec_qr.distributed.fused_params import OPTIMIZERS
from torchrec_qr.ops.arguments import Batch, Outcome
from torchrec_qr.ops.description import Description, PartitionLayout, TableLayout
from torchrec_qr.ops.lookup import stepped_lookup
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.ops.update_rules import Adam, Update, UpdateRule

# These partitions have more rows than a batch has ids, so that most rows stay untouched.
WIDE = {1: [900], 2: [400, 300], 3: [300, 200, 5], 4: [7, 300, 200, 3]}
LR, EPS = 0.02, 1e-4
# The seed of the hash of ids.
SEED = 5
RULES = {name: optimizer.rule for name, optimizer in OPTIMIZERS.items()}


def rule_of(name: str, max_gradient: float | None = None, weight_decay: float = 0.0, mode: str = "l2") -> UpdateRule:
    fields = {"beta1": BETA1, "beta2": BETA2} if issubclass(RULES[name], Adam) else {}
    fields["l2" if mode == "l2" else "decay"] = weight_decay
    return RULES[name](eps=EPS, max_gradient=max_gradient, **fields)


def update_of(rule: UpdateRule, weight: Tensor, lr: float = LR, t: int = 1, fill: float = 0.0) -> Update:
    """A step whose state holds ``fill`` everywhere."""
    shapes = rule.state_shapes(*weight.shape)
    state = {name: torch.full(shape, fill, device=weight.device) for name, shape in shapes.items()}
    return Update(rule, state, lr, t)


def widths_of(operation: str, dim: int, k: int) -> list[int]:
    """Returns uneven widths under ``concat``, of which the first is ``dim``."""
    return [dim, 4, 8, 12][:k] if operation == "concat" else [dim] * k


def case_of(kind: str, k: int) -> Kind:
    """ "vast": of so many rows that those of an id do not fit 64 bits, beside its place in the batch."""
    if kind not in ("wide", "vast"):
        return kind_of(kind, k)
    sizes = WIDE[k] if kind == "wide" else [20_000] * k
    return Kind(kind, MixedRadix(sizes=sizes), min(math.prod(sizes), 2**40), oracle.mixed_radix(sizes))


@dataclass
class StepCase:
    """A group of two tables of two features each, stepped by one optimizer."""

    kind: str
    k: int
    operation: str = "mult"
    dim: int = 8
    rule: str = "sgd"
    dtype: torch.dtype = torch.float32
    weighted: bool = False
    id_dtype: torch.dtype = torch.int64
    offset_dtype: torch.dtype = torch.int64
    num_bags: int = 7
    hot: bool = False
    max_gradient: float = math.inf
    hashed: bool = False  # the second table hashes any ids
    weight_decay: float = 0.0
    mode: str = "l2"
    stored: list[Tensor] = field(init=False)
    exact: list[Tensor] = field(init=False)
    states: list[dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.of_kind = case_of(self.kind, self.k)
        partitions, self.widths = self.of_kind.bound, widths_of(self.operation, self.dim, self.k)
        self.stored = []
        for _ in range(2):
            for j, (rows, width) in enumerate(zip(partitions.sizes, self.widths, strict=True)):
                w = torch.empty(rows, width).uniform_(0.5, 1.5, generator=generator)
                w *= torch.empty(rows, width).bernoulli_(0.5, generator=generator).mul(2).sub(1)
                # Configs store only the first partition in less than fp32.
                self.stored.append(w.to(self.dtype if j == 0 else torch.float32).requires_grad_())
        self.exact = [w.detach().double().requires_grad_() for w in self.stored]
        self.states = [zero_state(self.rule, w, torch.float32) for w in self.stored]
        self.exact_states = [zero_state(self.rule, w) for w in self.exact]
        self._optimizer = OptimizerReference(self.rule, LR, EPS, self.max_gradient, self.weight_decay, self.mode)
        layout = TableLayout(
            self.operation,
            partition_layouts(partitions, dict(enumerate(self.widths))),
            num_features=2,
            num_ids=partitions.num_embeddings,
        )
        class_map = partitions.class_map
        num_ids, rows_of = self.of_kind.num_embeddings, self.of_kind.rows_of
        self._rows_of = [rows_of, oracle.hashed(rows_of, num_ids, SEED) if self.hashed else rows_of]
        second = layout._replace(hash_seed=SEED if self.hashed else None)
        self.tables = Description([layout, second], ["a", "b"], [] if class_map is None else [class_map] * 2)

    def batch(self, step: int) -> list[list[list[int]]]:
        """Bags of ids per feature: two tables of two features."""
        rng = random.Random(step)
        num_ids, any_id = self.of_kind.num_embeddings, torch.iinfo(self.id_dtype)
        bags = []
        for f in range(4):
            low, high = (any_id.min, any_id.max + 1) if self.hashed and f >= 2 else (0, num_ids)
            pool = [rng.randrange(low, high) for _ in range(8)]
            lengths = [40 if self.hot else rng.randrange(4) for _ in range(self.num_bags)]
            if step == 2 and f == 1:
                lengths = [0] * self.num_bags
            bags.append(
                [[pool[0] if self.hot and rng.random() < 0.9 else rng.choice(pool) for _ in range(n)] for n in lengths]
            )
        return bags

    def run(self, step: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Steps both. Returns output and reference output, then the gradient of the ids' weights and its reference."""
        bags = self.batch(step)
        lengths = torch.tensor([[len(bag) for bag in of] for of in bags])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
        ids = torch.tensor([x for of in bags for bag in of for x in bag], dtype=torch.int64)
        generator = torch.Generator().manual_seed(step)
        id_weights = torch.rand(len(ids), generator=generator).add(0.5).requires_grad_() if self.weighted else None
        exact_weights = None if id_weights is None else id_weights.detach().double().requires_grad_()
        out = self.look_up(ids.to(self.id_dtype), offsets.to(self.offset_dtype), id_weights, step)
        table = torch.repeat_interleave(torch.tensor([0, 0, 1, 1]), lengths.sum(dim=1))
        of_ids = [self._rows_of[t](x) for t, x in zip(table.tolist(), ids.tolist(), strict=True)]
        classes = torch.tensor(of_ids).view(-1, self.k)
        expected = self._pool(classes, table, lengths, exact_weights)
        upstream = torch.randn(out.shape, generator=generator)
        out.backward(upstream)
        expected.backward(upstream.double())
        for i, (weight, state) in enumerate(zip(self.exact, self.exact_states, strict=True)):
            t, j = divmod(i, self.k)
            self._optimizer.step(weight, gradient_of(weight), state, classes[table == t, j].unique(), step + 1)
            weight.grad = None
            if (stored := self.stored[i].dtype) != torch.float32:
                weight.data = weight.data.to(stored).double()
        gradients = (None, None)
        if id_weights is not None and exact_weights is not None:
            gradients = (id_weights.grad, exact_weights.grad)
        return out.detach(), expected.detach(), *gradients

    def look_up(self, ids: Tensor, offsets: Tensor, id_weights: Tensor | None, step: int) -> Tensor:
        """Returns the output, whose backward steps. Tests of kernels for another device override it."""
        batch = Batch(ids, offsets, id_weights, True)
        return stepped_lookup(self.tables, self.stored, batch, lambda: self.updates(step))

    def _pool(self, classes: Tensor, table: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
        outputs = []
        for t in range(2):
            own = self.exact[t * self.k : (t + 1) * self.k]
            rows = [w[c] for w, c in zip(own, classes[table == t].T, strict=True)]
            composed = torch.cat(rows, dim=1) if self.operation == "concat" else rows[0]
            for row in rows[1:] if self.operation != "concat" else []:
                composed = composed * row if self.operation == "mult" else composed + row
            if weights is not None:
                composed = composed * weights[table == t].unsqueeze(1)
            of_features = lengths[2 * t : 2 * t + 2]
            for values, n in zip(composed.split(of_features.sum(dim=1).tolist()), of_features, strict=True):
                bag = torch.repeat_interleave(torch.arange(self.num_bags), n)
                out = torch.zeros(self.num_bags, composed.shape[1], dtype=torch.float64).index_add(0, bag, values)
                outputs.append(out)
        return torch.cat(outputs, dim=1)

    def updates(self, step: int) -> list[Outcome]:
        limit = None if self.max_gradient == math.inf else self.max_gradient
        rule = rule_of(self.rule, limit, self.weight_decay, self.mode)
        return [Update(rule, state, LR, step + 1) for state in self.states]


def train(case: StepCase, rtol: float, steps: int = 10) -> int:
    """Steps and compares; returns the number of rows that never moved."""
    initial = [w.detach().cpu().clone() for w in case.stored]
    for step in range(steps):
        out, expected, gradient, exact = case.run(step)
        assert_near(out, expected, rtol, f"step {step}: output")
        if gradient is not None and exact is not None:
            assert_near(gradient, exact, rtol, f"step {step}: gradient of the weights")
    stayed = 0
    for i, (w, exact, before) in enumerate(zip(case.stored, case.exact, initial, strict=True)):
        assert_near(w.detach(), exact.detach(), rtol, f"weight {i}")
        for name, state in case.states[i].items():
            assert_near(state, case.exact_states[i][name], rtol, f"state {name} of weight {i}")
        stay = (exact.detach() == before.double().cpu()).all(dim=1)
        assert torch.equal(w.detach().cpu()[stay], before[stay])
        stayed += int(stay.sum())
    return stayed


def one_table(rows: int = 5, width: int = 4, **fields: Any) -> tuple[Description, list[Tensor]]:
    """The smallest lookup: a table of one partition, ids being rows."""
    layout = TableLayout("add", (PartitionLayout(width, 1, rows),), **{"num_ids": rows, **fields})
    weight = torch.arange(float(rows * width)).view(rows, width)
    return Description([layout], ["t"]), [weight]
