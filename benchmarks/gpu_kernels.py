"""Speed of the Triton kernels on a GPU: ``python benchmarks/gpu_kernels.py --json FILE``.

Needs PyTorch and Triton only, and of this repository the folder ``torchrec_qr/ops``. Values are compared with float64
before and after the timed calls; a wrong case gets no times, and the exit code is 1. Per case, for the forward and for
the backward with an SGD step, over eight batches in turn:

- ``kernels_ms``: what the kernels take on the device, by the profiler; ``p20_ms``, ``p50_ms``, ``p80_ms``: between two
  events of the stream, which has the gaps between launches as well; ``wall_ms``: a call of many, queued;
- ``gb_s`` of the bytes that must move, by ``kernels_ms``: every unique row of each partition once (twice where it is
  stepped), ids, offsets, and the pooled output or its gradient; ``to_copy``, its ratio to a copy on the same device;
- ``to_full``, p50 as a ratio to lookups in the full tables of S rows: FBGEMM's TBE where it can be imported, else
  ``torch.nn.functional.embedding_bag`` (its backward: sparse gradients, then a plain SGD step by them).

Ids are log-uniform over [0, S), as ids in order of frequency are: of the smaller partition, one row has most of them.
"""

import argparse
import importlib.util
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

OPS = Path(__file__).parents[1] / "torchrec_qr" / "ops"
SGD = 1
LEARNING_RATE = 0.01
BATCHES = 8  # so that the cache does not hold the rows of all
QUIET = 1e-6  # of timed steps: rows stay of a size at which a check is exact


def load_kernels() -> Any:
    """The kernels, without ``torchrec_qr``, whose import needs TorchRec."""
    spec = importlib.util.spec_from_file_location("ops", OPS / "__init__.py", submodule_search_locations=[str(OPS)])
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["ops"] = package
    spec.loader.exec_module(package)
    for name in (
        "triton_kernels.launches",
        "triton_kernels.backward_launches",
        "triton_kernels.device_tables",
        "description",
    ):
        setattr(package, name.split(".")[-1], importlib.import_module(f"ops.{name}"))
    return package


class Case(NamedTuple):
    """A table per feature: of ``num_ids[f]`` ids, ``dims[f]`` columns and ``ids_per_bag[f]`` ids a bag."""

    num_ids: tuple[int, ...]
    dims: tuple[int, ...]
    ids_per_bag: tuple[int, ...]
    num_collisions: int
    bags: int

    def rows(self, f: int) -> tuple[int, int]:
        """Strided: row id % R_0 of partition 0, id // R_0 of partition 1."""
        return -(-self.num_ids[f] // self.num_collisions), self.num_collisions


class Batch(NamedTuple):
    """``ids`` feature after feature, and ``offsets`` of all bags."""

    ids: Tensor
    offsets: Tensor


def batch_of(case: Case, number: int, device: torch.device) -> Batch:
    generator = torch.Generator(device=device).manual_seed(number)
    ids, lengths = [], []
    for size, hot in zip(case.num_ids, case.ids_per_bag, strict=True):
        exponent = torch.rand(case.bags * hot, generator=generator, device=device, dtype=torch.float64)
        ids.append((float(size) ** exponent).long().sub_(1).clamp_(0, size - 1))
        lengths.append(torch.full((case.bags,), hot, device=device))
    offsets = F.pad(torch.cat(lengths).cumsum(0), (1, 0))
    return Batch(torch.cat(ids), offsets)


class Lookup:
    """Tables of two partitions, multiplied."""

    def __init__(self, kernels: Any, case: Case, device: torch.device) -> None:
        self.kernels, self.case = kernels, case
        self.batches = [batch_of(case, i, device) for i in range(BATCHES)]
        self.weights = [
            torch.empty(r, dim, device=device).uniform_(0.5, 1.5)
            for f, dim in enumerate(case.dims)
            for r in case.rows(f)
        ]
        self.gradient = torch.randn(case.bags, sum(case.dims), device=device)
        self.quiet = QUIET * self.gradient
        of_tables = []
        for f, size in enumerate(case.num_ids):
            first, second = case.rows(f)
            layout, dim = kernels.description.PartitionLayout, case.dims[f]
            partitions = layout(dim, 1, first), layout(dim, first, second)
            of_tables.append(kernels.description.TableLayout("mult", partitions, num_ids=size))
        description = kernels.description.Description(of_tables, [f"t{f}" for f in range(len(of_tables))])
        stored = list(map(kernels.device_tables.Stored.of, self.weights))
        self.described = kernels.device_tables.describe(description, stored, [], device)
        launches, count = kernels.backward_launches, len(self.weights)
        numbers = [LEARNING_RATE, 0.0, 0.0, 0.0, 1.0, 1.0, -1.0] * count
        self.stepping = launches.stepping_of(self.weights, [SGD] * count, [[]] * count, self.described)
        self.numbers = launches.Step([None] * count, [None] * count, numbers)

    def _batch(self, batch: Batch) -> Any:
        return self.kernels.launches.batch_of(self.described, batch.ids, batch.offsets, None, True)

    def forward(self, i: int) -> Tensor:
        out: Tensor = self.kernels.launches.look_up(self.described, self._batch(self.batches[i % BATCHES]))
        return out

    def backward(self, i: int, gradient: Tensor | None = None) -> None:
        batch, gradient = self._batch(self.batches[i % BATCHES]), self.quiet if gradient is None else gradient
        step = self.kernels.backward_launches.step_looked_up_rows
        step(self.described, batch, gradient, self.stepping, self.numbers)

    def class_rows(self, f: int, i: int) -> tuple[Tensor, Tensor]:
        """The row of each id of a feature in both partitions, (B, hot)."""
        before = self.case.bags * sum(self.case.ids_per_bag[:f])
        ids = self.batches[i].ids[before : before + self.case.bags * self.case.ids_per_bag[f]].view(self.case.bags, -1)
        first = self.case.rows(f)[0]
        return ids % first, ids // first

    def required_bytes(self) -> tuple[int, int]:
        """Returns those of the forward, and of the backward with its step, for the first batch."""
        rows = 0
        for f, dim in enumerate(self.case.dims):
            rows += 4 * dim * sum(of.unique().numel() for of in self.class_rows(f, 0))
        batch = 8 * (self.batches[0].ids.numel() + self.batches[0].offsets.numel()) + 4 * self.gradient.numel()
        return batch + rows, batch + 2 * rows

    def check(self) -> None:
        """Compares the output and all rows that a step of the first batch moves with float64."""
        before, column = [], 0
        for f in range(len(self.case.num_ids)):
            found = [of.unique(return_inverse=True) for of in self.class_rows(f, 0)]
            weights = self.weights[2 * f : 2 * f + 2]
            before.append([(rows, w[rows].double(), at) for (rows, at), w in zip(found, weights, strict=True)])
        out = self.forward(0).double()
        self.backward(0, self.gradient)
        for f, dim in enumerate(self.case.dims):
            span = slice(column, column + dim)
            column += dim
            parts = [old[at] for _, old, at in before[f]]
            torch.testing.assert_close(out[:, span], (parts[0] * parts[1]).sum(1), rtol=1e-5, atol=1e-4)
            upstream = self.gradient[:, span].double().unsqueeze(1)
            for j, (rows, old, at) in enumerate(before[f]):
                of_ids = (upstream * parts[1 - j]).view(-1, dim)
                step = torch.zeros_like(old).index_add_(0, at.view(-1), of_ids)
                # A hot row adds up tens of thousands of gradients of either sign.
                tolerance = 1e-5 * LEARNING_RATE * float(step.abs().max()) + 1e-6
                actual = self.weights[2 * f + j][rows].double()
                torch.testing.assert_close(actual, old - LEARNING_RATE * step, rtol=1e-5, atol=tolerance)


def timed(function: Callable[[int], Any], repetitions: int) -> dict[str, float]:
    """Milliseconds of a call, which is given its number; see the file's beginning."""
    for i in range(10):
        function(i)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    start = time.perf_counter()
    marks[0].record()
    for i in range(repetitions):
        function(i)
        marks[i + 1].record()
    torch.cuda.synchronize()
    wall = 1e3 * (time.perf_counter() - start) / repetitions
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(repetitions):
            function(i)
        torch.cuda.synchronize()
    on_device = sum(event.self_device_time_total for event in profile.key_averages()) / 1e3 / repetitions
    steps = torch.tensor([a.elapsed_time(b) for a, b in itertools.pairwise(marks)])
    p20, p50, p80 = steps.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"kernels_ms": on_device, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "wall_ms": wall}


def copy_rate(repetitions: int) -> float:
    """GB/s, reads and writes counted, of a copy that no cache holds."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / timed(lambda _: target.copy_(source), repetitions)["p50_ms"] / 1e6


class Full:
    """The tables that the partitions stand for, in ``embedding_bag``."""

    name = "embedding_bag"

    def __init__(self, lookup: Lookup) -> None:
        case = lookup.case
        self.lookup = lookup
        self.weights = [
            torch.empty(n, dim, device="cuda").uniform_(-1, 1).requires_grad_()
            for n, dim in zip(case.num_ids, case.dims, strict=True)
        ]

    def forward(self, i: int) -> Tensor:
        case, ids = self.lookup.case, self.lookup.batches[i % BATCHES].ids
        of_features = ids.split([case.bags * hot for hot in case.ids_per_bag])
        outputs = [
            F.embedding_bag(x.view(case.bags, -1), w, mode="sum", sparse=True)
            for x, w in zip(of_features, self.weights, strict=True)
        ]
        return torch.cat(outputs, dim=1)

    def step(self, i: int) -> None:
        self.forward(i).backward(self.lookup.quiet)
        with torch.no_grad():
            for w in self.weights:
                assert w.grad is not None
                w.add_(w.grad, alpha=-LEARNING_RATE)
                w.grad = None


class Tbe:
    """The tables that the partitions stand for, in FBGEMM.

    Raises:
        ImportError: there is no FBGEMM.
    """

    name = "tbe"

    def __init__(self, lookup: Lookup) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        case, place = lookup.case, (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
        self.lookup = lookup
        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(n, dim, *place) for n, dim in zip(case.num_ids, case.dims, strict=True)],
            optimizer=EmbOptimType.EXACT_SGD,
            learning_rate=LEARNING_RATE,
            device=torch.device("cuda"),
        )

    def forward(self, i: int) -> Tensor:
        batch = self.lookup.batches[i % BATCHES]
        out: Tensor = self.tables(batch.ids, batch.offsets)
        return out

    def step(self, i: int) -> None:
        self.forward(i).backward(self.lookup.quiet)


def measure(lookup: Lookup, copy: float, repetitions: int) -> dict[str, Any]:
    case = lookup.case
    row: dict[str, Any] = {key: _short(value) for key, value in case._asdict().items()}

    def step(i: int) -> None:
        lookup.forward(i)
        lookup.backward(i)

    phases: dict[str, Callable[[int], Any]] = {"forward": lookup.forward, "backward": lookup.backward, "step": step}
    times: dict[str, dict[str, float]] = {}
    for when in ("before", "after"):
        try:
            lookup.check()
        except AssertionError as error:
            return {**row, "wrong": f"{when} the timed calls: {error}"}
        times = times or {name: timed(function, repetitions) for name, function in phases.items()}
    forward, backward = lookup.required_bytes()
    for (name, of), required in zip(times.items(), (forward, backward, forward + backward), strict=True):
        gb_s = required / of["kernels_ms"] / 1e6
        row[name] = {**of, "required_bytes": required, "gb_s": gb_s, "to_copy": gb_s / copy}
    # The tables, and what their gradients take for a moment.
    stored = sum(4 * n * dim for n, dim in zip(case.num_ids, case.dims, strict=True))
    if stored * 1.2 < torch.cuda.mem_get_info()[0]:
        try:
            full: Full | Tbe = Tbe(lookup)
        except ImportError:
            full = Full(lookup)
        row["full_is"] = full.name
        with torch.no_grad():
            row["forward"]["to_full"] = times["forward"]["p50_ms"] / timed(full.forward, repetitions)["p50_ms"]
        row["step"]["to_full"] = times["step"]["p50_ms"] / timed(full.step, repetitions)["p50_ms"]
    return row


def _short(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def grid(bags: int) -> list[Case]:
    """The tables and batch of NVIDIA's dynamicemb benchmark; one table of many sizes; 26 tables; 26 unlike tables."""
    cases = [Case((1_677_721,) * 10, (128,) * 10, (1,) * 10, collisions, bags * 8 // 5) for collisions in (1295, 4)]
    cases += [
        Case((num_ids,), (dim,), (hot,), collisions, bags)
        for num_ids in (10**6, 10**7, 4 * 10**7)
        for collisions in (4, math.isqrt(num_ids))
        for dim in (64, 128)
        for hot in (1, 10)
    ]
    many = (10**6,) * 26
    for collisions in (4, 1000):
        cases += [Case(many, (128,) * 26, (hot,) * 26, collisions, bags // 8) for hot in (1, 10)]
        widths, ids_per_bag = ((64, 128, 32) * 9)[:26], ((1, 3, 20, 1) * 7)[:26]
        cases.append(Case(many, widths, ids_per_bag, collisions, bags // 8))
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results, anew after each case")
    parser.add_argument("--batch", type=int, default=65536, help="bags per batch and feature; of 26 tables an eighth")
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--check-only", action="store_true", help="small cases, values only; CPU if TRITON_INTERPRET=1")
    arguments = parser.parse_args()
    kernels = load_kernels()
    if arguments.check_only:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for collisions in (4, 7):
            Lookup(kernels, Case((50,), (16,), (2,), collisions, 40), device).check()
            Lookup(kernels, Case((50, 30, 7), (16, 8, 16), (2, 1, 3), collisions, 20), device).check()
        print("values: right")
        return 0
    if not torch.cuda.is_available():
        sys.exit("no CUDA device; with TRITON_INTERPRET=1, --check-only compares values on a CPU")
    import triton

    device = torch.device("cuda")
    copy = copy_rate(arguments.repetitions)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    rows: list[dict[str, Any]] = []
    print(f"{machine}; copy {copy:.0f} GB/s")
    for case in grid(arguments.batch):
        rows.append(measure(Lookup(kernels, case, device), copy, arguments.repetitions))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.json is not None:
            results = {"date": date.today().isoformat(), **machine, "copy_gb_s": copy, "rows": rows}
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        torch.cuda.empty_cache()
    return int(any("wrong" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
