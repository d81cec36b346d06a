"""A rank of the step benchmark: builds variants, times them in turn, counts what they send."""

import inspect
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.step_cells import Tables, batch, upstream
from benchmarks.step_check import check
from benchmarks.step_variants import Variant, make

_WARM_UP = 3
_BATCHES = 4


def measure(
    tables: Tables, ms: list[int], hots: list[int], variants: list[str], bags: int, runs: int, steps: int
) -> Iterator[dict[str, Any]]:
    """Yields, on every rank, a row per variant and (m, hot); ratios are to ``full`` table-wise under data-parallel."""
    with_full = "full" in variants
    shared: dict[str, Variant] = {}
    if with_full:
        # Data-parallel is the compressed tables' alone: full ones would all-reduce gigabytes.
        by = replace(tables, sharding="table_wise") if tables.sharding == "data_parallel" else tables
        shared["full"] = make("full", by, 1)
    for m in ms:
        built = shared | {name: make(name, tables, m) for name in variants if name != "full"}
        for hot in hots:
            yield from _measure(built, tables, m, hot, bags, runs, steps)


def _measure(
    built: dict[str, Variant], tables: Tables, m: int, hot: int, bags: int, runs: int, steps: int
) -> Iterator[dict[str, Any]]:
    rank = dist.get_rank()
    batches = [batch(tables, hot, bags, rank, i) for i in range(_BATCHES)]
    gradient = upstream(tables, bags, rank)
    for variant in built.values():
        check(variant, bags, hot, 90)
        for i in range(_WARM_UP):
            variant.step(batches[i % _BATCHES], bags, hot, gradient)
    sent = {name: _sent(variant, batches[0], bags, hot, gradient) for name, variant in built.items()}
    grown = {name: _growth(variant, batches[0], bags, hot, gradient) for name, variant in built.items()}
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(runs)] for name in built}
    worked: dict[str, list[float]] = {name: [] for name in built}
    for run in range(runs):
        for i in range(steps):
            for name, variant in built.items():
                dist.barrier()
                start, cpu = time.perf_counter(), time.process_time()
                variant.step(batches[i % _BATCHES], bags, hot, gradient)
                worked[name].append(time.process_time() - cpu)
                dist.barrier()
                times[name][run].append(time.perf_counter() - start)
    errors = {name: check(variant, bags, hot, 91) for name, variant in built.items()}
    medians = {name: [1e3 * statistics.median(run) for run in of] for name, of in times.items()}
    for name, of in medians.items():
        ratios = [t / full for t, full in zip(of, medians.get("full", of), strict=True)]
        yield {
            "variant": name,
            "sharding": built[name].tables.sharding,
            "m": m,
            "hot": hot,
            "dim": tables.dim,
            "num_ids": tables.num_ids,
            "num_features": tables.num_features,
            "optimizer": tables.optimizer,
            "median_ms": round(statistics.median(of), 2),
            "ratio_to_full": round(statistics.median(ratios), 3) if "full" in medians else None,
            "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)] if "full" in medians else None,
            "median_cpu_ms": round(1e3 * statistics.median(worked[name]), 2),
            "a2a_float_mb": round(sent[name]["float"] / 1e6, 2),
            "a2a_int_mb": round(sent[name]["int"] / 1e6, 2),
            "all_reduce_mb": round(sent[name]["all_reduce"] / 1e6, 2),
            "peak_rss_mb": round(grown[name][0], 1),
            "step_growth_mb": round(grown[name][1], 1),
            "largest_error": float(f"{errors[name]:.1e}"),
        }


def _sent(variant: Variant, ids: Tensor, bags: int, hot: int, gradient: Tensor) -> Counter[str]:
    """Bytes of a step that this rank sends to others, by kind."""
    with _counting() as bytes_of:
        variant.step(ids, bags, hot, gradient)
    return bytes_of


@contextmanager
def _counting() -> Iterator[Counter[str]]:
    bytes_of: Counter[str] = Counter()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    all_to_all, all_reduce, isend = dist.all_to_all_single, dist.all_reduce, dist.isend

    def counted(*a: Any, **k: Any) -> Any:
        given = inspect.signature(all_to_all).bind(*a, **k).arguments
        tensor, splits = given["input"], given.get("input_split_sizes")
        own = tensor.numel() // world_size
        if splits:
            own = splits[rank] * (tensor.numel() // max(sum(splits), 1))
        kind = "float" if tensor.is_floating_point() else "int"
        bytes_of[kind] += (tensor.numel() - own) * tensor.element_size()
        return all_to_all(*a, **k)

    def counted_send(tensor: Tensor, *a: Any, **k: Any) -> Any:
        bytes_of["float" if tensor.is_floating_point() else "int"] += tensor.numel() * tensor.element_size()
        return isend(tensor, *a, **k)

    def counted_reduce(tensor: Tensor, *a: Any, **k: Any) -> Any:
        bytes_of["all_reduce"] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *a, **k)

    dist.all_to_all_single, dist.all_reduce, dist.isend = counted, counted_reduce, counted_send
    try:
        yield bytes_of
    finally:
        dist.all_to_all_single, dist.all_reduce, dist.isend = all_to_all, all_reduce, isend


def _growth(variant: Variant, ids: Tensor, bags: int, hot: int, gradient: Tensor) -> tuple[float, float]:
    """Peak resident MB of the process in a step, and how far that is above what it has before."""
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan"), float("nan")
    variant.step(ids, bags, hot, gradient)
    peak = _status("VmHWM")
    return peak / 1e3, (peak - before) / 1e3


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def run_rank(arguments: dict[str, Any], cells: list[dict[str, Any]], out: str) -> None:
    """Runs all cells; rank 0 appends a JSON line per row to ``out``."""
    torch.set_num_threads(1)
    for cell in cells:
        tables = Tables(**cell["tables"])
        for row in measure(tables, cell["ms"], cell["hots"], cell["variants"], **arguments):
            if dist.get_rank() == 0:
                with open(out, "a") as file:
                    file.write(json.dumps(row) + "\n")
