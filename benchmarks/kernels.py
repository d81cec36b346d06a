"""The CPU kernels alone, against ``memcpy`` of the bytes that they cannot do without: ``python -m benchmarks.kernels``.

On one thread, and on the tables that a rank of two has in `benchmarks.step`. Required bytes: each unique row of each
partition once, ids, offsets, and the output or its gradient. All are timed in turn in one run.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import about
from torchrec_qr.distributed.fused_params import OPTIMIZERS
from torchrec_qr.ops.arguments import Batch, Outcome
from torchrec_qr.ops.cpu_library import status
from torchrec_qr.ops.description import Description, PartitionLayout, TableLayout
from torchrec_qr.ops.lookup import stepped_lookup
from torchrec_qr.ops.memory import recycled, zeros
from torchrec_qr.ops.update_rules import Update

_NUM_IDS, _DIM, _TABLES, _BAGS = 200_000, 64, 13, 4096
_OPTIMIZERS = ("sgd", "rowwise_adagrad")


def main() -> None:
    """Prints, and writes, a row per m, number of ids a bag and optimizer."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    parser.add_argument("--json", type=Path, help="writes the rows to this file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help="timed steps per run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(m, hot, optimizer, options.runs, options.steps)
        for optimizer in _OPTIMIZERS
        for m in (4, math.isqrt(_NUM_IDS))
        for hot in (1, 10)
    ]
    for row in rows:
        print(
            f"m={row['m']:<4} hot={row['hot']:<3} {row['optimizer']:16} required {row['required_mb']:6.1f} MB, memcpy "
            f"{row['memcpy_ms']:6.2f} ms; forward {row['forward_ratio']:5.2f} times {row['forward_spread']}, backward "
            f"and step {row['backward_ratio']:5.2f} times {row['backward_spread']}"
        )
    if options.json:
        options.json.write_text(json.dumps({**about(), "lookup": status(), "rows": rows}, indent=1) + "\n")


def measure(m: int, hot: int, optimizer: str, runs: int, steps: int) -> dict[str, Any]:
    """Returns medians over the runs, each of the run's median, and least and largest ratio."""
    batches = [_RankBatch(m, hot, number) for number in range(4)]
    tables = _Tables(m, optimizer)
    source = torch.ones(batches[0].required_bytes(m), dtype=torch.uint8)
    target = torch.zeros_like(source)
    times: list[dict[str, list[float]]] = [{"memcpy": [], "forward": [], "backward": []} for _ in range(runs)]
    for i in range(-3, runs * steps):
        batch, run = batches[i % len(batches)], times[max(i, 0) // steps]
        copying = _timed(partial(target.copy_, source))[0]
        forward, out = _timed(partial(tables.look_up, batch))
        backward = _timed(partial(out.backward, batch.gradient))[0]
        if i >= 0:
            run["memcpy"].append(copying)
            run["forward"].append(forward)
            run["backward"].append(backward)
    medians = {name: [statistics.median(run[name]) for run in times] for name in times[0]}
    row: dict[str, Any] = {"m": m, "hot": hot, "optimizer": optimizer, "required_mb": round(len(source) / 1e6, 1)}
    row |= {f"{name}_ms": round(1e3 * statistics.median(of), 3) for name, of in medians.items()}
    for name in ("forward", "backward"):
        ratios = [t / copying for t, copying in zip(medians[name], medians["memcpy"], strict=True)]
        row[f"{name}_ratio"] = round(statistics.median(ratios), 2)
        row[f"{name}_spread"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return row


class _RankBatch:
    def __init__(self, m: int, hot: int, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.ids = torch.randint(_NUM_IDS, (_TABLES, _BAGS * hot), generator=generator)
        self.offsets = torch.arange(0, self.ids.numel() + 1, hot)
        # The tensor that the all-to-all receives.
        self.gradient = torch.rand(
            _BAGS, _TABLES * _DIM, generator=generator, out=recycled((_BAGS, _TABLES * _DIM), torch.float32)
        )

    def required_bytes(self, m: int) -> int:
        rows = sum(len((ids % m).unique()) + len((ids // m).unique()) for ids in self.ids)
        floats = rows * _DIM + self.gradient.numel()
        return 4 * floats + 8 * (self.ids.numel() + self.offsets.numel())


class _Tables:
    """Quotient-remainder tables under ``mult``, stepped in their backward."""

    def __init__(self, m: int, optimizer: str) -> None:
        sizes = (m, -(-_NUM_IDS // m))
        layout = TableLayout(
            "mult", (PartitionLayout(_DIM, 1, sizes[0]), PartitionLayout(_DIM, m, sizes[1])), num_ids=_NUM_IDS
        )
        self._described = Description([layout] * _TABLES, [f"t{i}" for i in range(_TABLES)])
        # As sharded tables lie.
        self._weights = [
            zeros((n, _DIM), torch.float32, None).add_(1).requires_grad_() for _ in range(_TABLES) for n in sizes
        ]
        rule = OPTIMIZERS[optimizer].rule()
        self._updates: list[Outcome] = []
        for w in self._weights:
            state = {name: torch.zeros(shape) for name, shape in rule.state_shapes(*w.shape).items()}
            self._updates.append(Update(rule, state, rule.learning_rate))

    def look_up(self, batch: _RankBatch) -> Tensor:
        given = Batch(batch.ids.view(-1), batch.offsets, None, True)
        return stepped_lookup(self._described, self._weights, given, lambda: self._updates)


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = function()
    return time.perf_counter() - start, out


if __name__ == "__main__":
    main()
