"""Steps of the Triton backend whose launches do nothing: a line of JSON for each case."""

import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from dry_launch import DryLaunches
from pairwise import pairwise
from torch import Tensor

from torchrec_qr.distributed.fused_params import OPTIMIZERS
from torchrec_qr.ops.arguments import Batch, DenseGradient, Outcome, Replica, SentFeature
from torchrec_qr.ops.backends import triton
from torchrec_qr.ops.description import CodeLayout, Description, PartitionLayout, TableLayout
from torchrec_qr.ops.update_rules import Update

NUMBERS = (3, 52)
ARCHITECTURES = (80, 90, 100)
# One for which nothing is compiled: what is bound there is not taken for compiled.
ARCHITECTURE_BOUND = 89
ROWS, COLLISIONS, DIM = 1000, 4, 16
NUM_IDS = ROWS * COLLISIONS
RULES = {name: optimizer.rule() for name, optimizer in OPTIMIZERS.items()}


@dataclass
class Tables:
    """Tables of one kind, their state, and a step of them."""

    number: int = 3
    operation: str = "mult"
    data_type: str = "float32"
    rule: str = "adagrad"
    weighted: bool = False
    pooled: bool = True
    kind: str = "strided"
    int32: bool = False
    weights: list[Tensor] = field(init=False)
    outcomes: list[Outcome] = field(init=False)
    tables: Description = field(init=False)

    def __post_init__(self) -> None:
        dtype = getattr(torch, self.data_type)
        self.weights = [torch.ones(r, DIM, dtype=dtype) for _ in range(self.number) for r in (ROWS, COLLISIONS)]
        self.outcomes = [self._outcome(w) for w in self.weights]
        class_maps = [torch.zeros(2, NUM_IDS, dtype=torch.int32) for _ in range(self.number)]
        names = [f"t{i}" for i in range(self.number)]
        layouts = [self._layout()] * self.number
        self.tables = Description(layouts, names, class_maps if self.kind == "explicit" else [])

    def _outcome(self, weight: Tensor) -> Outcome:
        if self.rule == "dense":
            return DenseGradient()
        rule = RULES[self.rule]
        shapes = rule.state_shapes(*weight.shape)
        return Update(rule, {name: torch.zeros(shape) for name, shape in shapes.items()}, learning_rate=0.1)

    def _layout(self) -> TableLayout:
        partitions = PartitionLayout(DIM, 1, ROWS), PartitionLayout(DIM, ROWS, COLLISIONS)
        code = CodeLayout(COLLISIONS, 1, ROWS, 0) if self.kind == "coded" else None
        if self.kind == "explicit":
            partitions = PartitionLayout(DIM, map_row=0), PartitionLayout(DIM, map_row=1)
        return TableLayout(self.operation, partitions, 1, NUM_IDS, code=code)

    def step(self, bags: int = 16, hot: int = 2, shift: int = 0) -> None:
        """Looks up and steps a batch, whose ids are a slice that begins ``shift`` ids after aligned memory."""
        n = self.number * bags * hot
        dtype = torch.int32 if self.int32 else torch.int64
        ids = torch.zeros(n + shift, dtype=dtype)[shift:]
        weights = torch.ones(n + shift)[shift:].requires_grad_() if self.weighted else None
        ends = torch.arange(0, n + 1, hot if self.pooled else bags * hot, dtype=dtype)
        batch = Batch(ids, ends, weights, self.pooled)
        out = triton.forward(self.tables, self.weights, batch)
        with torch.no_grad():
            gradient = torch.zeros_like(out)
            triton.backward(self.tables, self.weights, batch, gradient, self.outcomes, self.weighted)

    def step_replicas(self) -> None:
        """Steps the weights as replicas."""
        updates = [outcome for outcome in self.outcomes if isinstance(outcome, Update)]
        pairs = zip(self.weights, updates, strict=True)
        triton.update_replicas([Replica(weight, torch.zeros(weight.shape), update) for weight, update in pairs])


def costs_of(dry: DryLaunches, number: int) -> dict[str, dict[str, dict[str, int]]]:
    """Launches of a step, and compilations of the first step, the second, and of steps of other batches."""
    compilations: dict[str, int] = {}

    def note(when: str) -> None:
        compilations.update({f"{when} {kernel}": n for kernel, n in sorted(dry.compilations.items())})
        dry.compilations.clear()

    tables, dry.architecture = Tables(number), 90
    dry.compilations.clear()
    tables.step()
    note("first step")
    dry.launches.clear()
    tables.step()
    launches = dict(sorted(dry.launches.items()))
    note("second step")
    for bags, hot in ((17, 2), (33, 3), (128, 1), (1, 1), (640, 2)):
        tables.step(bags, hot)
    note("other sizes")
    for shift in (1, 2, 3):
        tables.step(64, 4, shift)
        tables.step(777, 1, shift)
    note("other alignments")
    return {"torchrec_qr": {"launches": launches, "compilations": compilations}}


def every_kernel(architecture: int) -> Callable[[DryLaunches], dict[str, Any]]:
    """Compiles what one step of weighted ids launches, enough of them that rows are cut into supers."""

    def run(dry: DryLaunches) -> dict[str, Any]:
        dry.architecture = architecture
        dry.launches.clear()
        tables = Tables(number=1, weighted=True)
        tables.step(bags=2100, hot=1)
        tables.step_replicas()
        fields = triton.fields_of_sent([SentFeature(NUM_IDS, "error")])
        triton.send_ids(fields, torch.zeros(4, dtype=torch.int64), torch.arange(5), 4, lambda number: None)
        return {"launched": sorted(dry.launches)}

    return run


def bound(fields: dict[str, Any]) -> Callable[[DryLaunches], dict[str, Any]]:
    """Binds the arguments of a step's launches, and compiles nothing."""

    def run(dry: DryLaunches) -> dict[str, Any]:
        dry.architecture, dry.only_bound = ARCHITECTURE_BOUND, True
        Tables(number=2, **fields).step()
        return {}

    return run


def dry_cases() -> Iterator[tuple[str, Callable[[DryLaunches], dict[str, Any]]]]:
    """The names of all cases, and what to do for each."""
    for number in NUMBERS:
        # The second compiles nothing: tables differ in what descriptors say, and share kernels.
        yield f"{number} tables", lambda dry, number=number: {"costs": costs_of(dry, number)}
    for architecture in ARCHITECTURES:
        yield f"every kernel for sm_{architecture}", every_kernel(architecture)
    factors: dict[str, tuple[Any, ...]] = {
        "operation": ("mult", "add", "concat"),
        "data_type": ("float32", "float16", "bfloat16"),
        "rule": ("adagrad", "sgd", "rowwise_adagrad", "adam", "amsgrad", "dense"),
        "weighted": (False, True),
        "pooled": (True, False),
        "kind": ("strided", "coded", "explicit"),
        "int32": (False, True),
    }
    for fields in pairwise(factors):
        yield "bound " + " ".join(map(str, fields.values())), bound(fields)


def run_all() -> None:
    """Prints, per case, what came of it, or its error."""
    dry = DryLaunches()
    for name, run in dry_cases():
        try:
            result = run(dry)
        except BaseException:
            result = {"error": traceback.format_exc()}
        print(json.dumps({"case": name, **result}), flush=True)
