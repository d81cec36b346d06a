"""Speed of the Triton kernels on a GPU: ``python benchmarks/gpu_kernels.py --json FILE``.

Needs PyTorch and Triton only, and of this repository the folder ``torchrec_qr/ops/triton_kernels``. Values are compared
with float64 first; a wrong one ends the run. Then, per case, for the forward and for the backward with an SGD step:

- GB/s of the bytes that must move: every unique row of each partition once (twice where it is stepped), ids, offsets,
  and the pooled output or its gradient;
- its ratio to a copy on the same device, measured in the same run;
- the time as a ratio to ``torch.nn.functional.embedding_bag`` over the full table of S rows (its backward: sparse
  gradients, then a plain SGD step by them).

Ids are log-uniform over [0, S), as ids in order of frequency are: of the smaller partition, one row has most of them.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

KERNELS = Path(__file__).parents[1] / "torchrec_qr" / "ops" / "triton_kernels"
SGD = 1
LEARNING_RATE = 0.01


def load_kernels() -> Any:
    """The kernels, without ``torchrec_qr``, whose import needs TorchRec."""
    spec = importlib.util.spec_from_file_location(
        "triton_kernels", KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["triton_kernels"] = package
    spec.loader.exec_module(package)
    for name in ("run", "tables"):
        setattr(package, name, importlib.import_module(f"triton_kernels.{name}"))
    return package


class Case(NamedTuple):
    num_ids: int
    num_collisions: int
    dim: int
    hot: int
    batch: int

    @property
    def rows(self) -> list[int]:
        """Strided: row id % R_0 of partition 0, id // R_0 of partition 1."""
        first = -(-self.num_ids // self.num_collisions)
        return [first, self.num_collisions]


class Lookup:
    """One table, mult, of two partitions, and a batch of bags of ``hot`` ids each."""

    def __init__(self, kernels: Any, case: Case, device: torch.device) -> None:
        self.run, self.case = kernels.run, case
        generator = torch.Generator(device=device).manual_seed(0)
        n = case.batch * case.hot
        exponent = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        self.ids = (float(case.num_ids) ** exponent).long().sub_(1).clamp_(0, case.num_ids - 1)
        self.offsets = torch.arange(0, n + 1, case.hot, device=device)
        self.weights = [torch.empty(r, case.dim, device=device).uniform_(0.5, 1.5) for r in case.rows]
        self.gradient = torch.randn(case.batch, case.dim, generator=generator, device=device)
        tables, (first, second) = kernels.tables, case.rows
        stored = [tables.Stored.of(w) for w in self.weights]
        partitions = (tables.Partition(stored[0], 1, first), tables.Partition(stored[1], first, second))
        self.described = tables.describe((tables.Table("mult", partitions, num_ids=case.num_ids),), device)

    def _batch(self) -> Any:
        return self.run.batch_of(self.described, self.ids, self.offsets, None, True)

    def forward(self) -> Tensor:
        out: Tensor = self.run.look_up(self.described, self._batch())
        return out

    def backward(self) -> None:
        batch = self._batch()
        sums = [self.run.sum_rows(self.described, batch, self.gradient, j, [True, True]) for j in (0, 1)]
        nothing = torch.empty(0)
        numbers = [LEARNING_RATE, 0.0, 0.0, 0.0, 1.0, 1.0, -1.0] * 2
        steps = self.run.Steps([SGD, SGD], [[], []], [nothing, nothing], [], numbers)
        self.run.step_weights(self.weights, sums, steps)

    def class_rows(self) -> list[Tensor]:
        first = self.case.rows[0]
        return [self.ids % first, self.ids // first]

    def required_bytes(self) -> tuple[int, int]:
        """Of the forward and of the backward with its step."""
        unique = sum(rows.unique().numel() for rows in self.class_rows())
        row = 4 * self.case.dim
        batch = 8 * (self.ids.numel() + self.offsets.numel()) + row * self.case.batch
        return batch + row * unique, batch + 2 * row * unique

    def check(self) -> None:
        """Compares the output and the rows after a step with float64, all of them."""
        exact = [w.double() for w in self.weights]
        rows = self.class_rows()
        parts = [w[r] for w, r in zip(exact, rows, strict=True)]
        bag = torch.arange(self.case.batch, device=self.ids.device).repeat_interleave(self.case.hot)
        expected = torch.zeros(self.gradient.shape, dtype=torch.float64, device=self.ids.device)
        expected.index_add_(0, bag, parts[0] * parts[1])
        torch.testing.assert_close(self.forward().double(), expected, rtol=1e-5, atol=1e-4)
        upstream = self.gradient.double()[bag]
        self.backward()
        for j, w in enumerate(exact):
            step = torch.zeros_like(w).index_add_(0, rows[j], upstream * parts[1 - j])
            stepped = w - LEARNING_RATE * step
            # A hot row adds up tens of thousands of gradients of either sign.
            tolerance = 1e-5 * LEARNING_RATE * float(step.abs().max()) + 1e-6
            torch.testing.assert_close(self.weights[j].double(), stepped, rtol=1e-5, atol=tolerance)


def milliseconds(function: Callable[[], Any], repetitions: int) -> float:
    """The median on the device, caches of the last call being what they are: batches follow one another, too."""
    for _ in range(10):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events)


def copy_rate(repetitions: int) -> float:
    """GB/s, reads and writes counted, of a copy that no cache holds."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source), repetitions) / 1e6


class Full:
    """``embedding_bag`` over the table that the partitions stand for."""

    def __init__(self, lookup: Lookup) -> None:
        case = lookup.case
        self.lookup = lookup
        self.weight = torch.empty(case.num_ids, case.dim, device="cuda").uniform_(-1, 1).requires_grad_()

    def forward(self) -> Tensor:
        return F.embedding_bag(
            self.lookup.ids, self.weight, self.lookup.offsets, mode="sum", sparse=True, include_last_offset=True
        )

    def both(self) -> None:
        self.forward().backward(self.lookup.gradient)
        with torch.no_grad():
            assert self.weight.grad is not None
            self.weight.add_(self.weight.grad, alpha=-LEARNING_RATE)
            self.weight.grad = None


def measure(lookup: Lookup, copy: float, repetitions: int) -> dict[str, Any]:
    case = lookup.case
    forward, backward = (milliseconds(f, repetitions) for f in (lookup.forward, lookup.backward))
    row: dict[str, Any] = {**case._asdict(), "forward_ms": forward, "backward_ms": backward}
    for name, ms, required in zip(("forward", "backward"), (forward, backward), lookup.required_bytes(), strict=True):
        row[f"{name}_gb_s"] = required / ms / 1e6
        row[f"{name}_to_copy"] = row[f"{name}_gb_s"] / copy
    # The table, and what its gradients take for a moment.
    if case.num_ids * case.dim * 4 * 1.2 < torch.cuda.mem_get_info()[0]:
        full = Full(lookup)
        with torch.no_grad():
            row["forward_to_full"] = forward / milliseconds(full.forward, repetitions)
        row["step_to_full"] = (forward + backward) / milliseconds(full.both, repetitions)
    return row


def grid(batch: int) -> list[Case]:
    return [
        Case(num_ids, collisions, dim, hot, batch)
        for num_ids in (10**6, 10**7, 4 * 10**7)
        for collisions in (4, math.isqrt(num_ids))
        for dim in (64, 128)
        for hot in (1, 10)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--batch", type=int, default=65536, help="bags per batch")
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--check-only", action="store_true", help="small cases, values only; CPU if TRITON_INTERPRET=1")
    arguments = parser.parse_args()
    kernels = load_kernels()
    if arguments.check_only:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for collisions in (4, 7):
            Lookup(kernels, Case(50, collisions, 16, 2, 40), device).check()
        print("values: right")
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device; with TRITON_INTERPRET=1, --check-only compares values on a CPU")
    import triton

    device = torch.device("cuda")
    for case in [Case(10**6, m, dim, hot, 8192) for m in (4, 1000) for dim in (64, 128) for hot in (1, 10)]:
        Lookup(kernels, case, device).check()
    copy = copy_rate(arguments.repetitions)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    rows: list[dict[str, Any]] = []
    print(f"{machine}; values: right; copy {copy:.0f} GB/s")
    for case in grid(arguments.batch):
        row = measure(Lookup(kernels, case, device), copy, arguments.repetitions)
        rows.append(row)
        print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        torch.cuda.empty_cache()
    if arguments.json is not None:
        results = {"date": date.today().isoformat(), **machine, "copy_gb_s": copy, "rows": rows}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
