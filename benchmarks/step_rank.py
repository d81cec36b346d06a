"""A rank of the step benchmark: builds variants, times them in turn, counts what they send."""

import inspect
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.comm import get_local_size

from benchmarks.step_cells import Batch, Cell, Traffic, upstream
from benchmarks.step_check import check
from benchmarks.step_device import burst, burst_of_eval, peak_of
from benchmarks.step_variant import Variant
from benchmarks.step_variants import VARIANTS

_WARM_UP = 3
_BATCHES = 8  # so that no cache holds the rows of all
# The gradient of timed steps, as a part of that of the checked ones: rows stay of a size at which a check is exact.
_QUIET = 1e-6
_PHASES = ("forward", "backward", "step", "eval")


def measure(cell: Cell, runs: int, steps: int, copy_gb_s: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yields, on every rank, a row per variant, m and traffic; docs/launch.md says what is in it."""
    tables = cell.tables
    uncompressed: dict[str, Variant] = {}
    for name in cell.variants:
        if not VARIANTS[name].compresses:
            # Data-parallel is the compressed tables' alone: full ones would all-reduce gigabytes.
            by = replace(tables, sharding="table_wise") if tables.sharding == "data_parallel" else tables
            uncompressed[name] = VARIANTS[name](by, 1, cell.traffics[0], device)
    for m in cell.ms:
        built = {
            name: uncompressed.get(name) or VARIANTS[name](tables, m, cell.traffics[0], device)
            for name in cell.variants
        }
        for traffic in cell.traffics:
            for row in _measure(built, traffic, runs, steps, copy_gb_s, device):
                yield {"m": m, **row}


def _measure(
    built: dict[str, Variant], traffic: Traffic, runs: int, steps: int, copy_gb_s: float, device: torch.device
) -> Iterator[dict[str, Any]]:
    tables, rank = next(iter(built.values())).tables, dist.get_rank()
    batches = [Batch(tables, traffic, rank, i, device) for i in range(_BATCHES)]
    gradient = upstream(tables, traffic.bags, rank, device) * _QUIET
    before = {name: check(variant, traffic, 90) for name, variant in built.items()}
    right = {name: variant for name, variant in built.items() if before[name].wrong is None}
    for variant in right.values():
        burst(variant, batches[:_WARM_UP], gradient, device)
        burst_of_eval(variant, batches[:_WARM_UP], device)
    sent = {name: _sent(variant, batches[0], gradient) for name, variant in right.items()}
    memory = {name: peak_of(partial(variant.step, batches[0], gradient), device) for name, variant in right.items()}
    times = _times(right, batches, gradient, runs, steps, device)
    after = {name: check(variant, traffic, 91) for name, variant in right.items()}
    for name, variant in built.items():
        row = _described(name, variant, traffic)
        wrong = before[name].wrong or after[name].wrong
        if wrong is not None:
            yield {**row, "wrong": f"{'before' if before[name].wrong else 'after'} the timed steps: {wrong}"}
            continue
        full = "full" if variant.divides_by_ranks or "tbe" not in built else "tbe"
        of_full = times[full] if full in right and after[full].wrong is None else None
        of_all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, memory[name])
        yield {
            **row,
            "largest_error_of_allowed": float(f"{max(before[name].error, after[name].error):.1e}"),
            **_summary(times[name], of_full, required_bytes(variant, traffic), copy_gb_s),
            "full_is": full if of_full else None,
            "a2a_float_mb": round(sent[name]["float"] / 1e6, 2),
            "a2a_int_mb": round(sent[name]["int"] / 1e6, 2),
            "all_reduce_mb": round(sent[name]["all_reduce"] / 1e6, 2),
            "to_other_nodes_mb": round(sent[name]["to_other_nodes"] / 1e6, 2),
            "peak_memory_mb_of_ranks": [peak for peak, _ in of_all],
            "step_growth_mb_of_ranks": [growth for _, growth in of_all],
        }


def required_bytes(variant: Variant, traffic: Traffic) -> dict[str, float]:
    """Returns what must move in each phase of a step through a rank's memory, without communication.

    With U the rows of a table's tensors that the batches of all W ranks look up, each once, D their columns, N the ids
    and B·F the bags of a rank, all in float32 and int64:

    - ``forward`` and ``eval``: 4·D·ΣU/W + 8·N + 8·(B·F + 1) + 4·D·B·F, the output;
    - ``backward``: 2·4·D·ΣU/W, rows read and written, + 8·N + 8·(B·F + 1) + 4·D·B·F, the gradient;
    - ``step``: both.
    """
    tables, world_size = variant.tables, dist.get_world_size() if variant.divides_by_ranks else 1
    ranks = range(world_size) if variant.divides_by_ranks else [dist.get_rank()]
    batches = [Batch(tables, traffic, r, 0, variant.device) for r in ranks]
    rows = 0
    for f in range(len(tables.sizes)):
        of_ranks = [variant.classes(f, batch.ids[f]) for batch in batches]
        rows += sum(torch.cat([c.flatten() for c in of]).unique().numel() for of in zip(*of_ranks, strict=True))
    stored = 4 * tables.dim * rows / world_size
    bags = traffic.bags * len(tables.sizes)
    batch = 8 * traffic.bags * sum(traffic.ids_per_bag) + 8 * (bags + 1) + 4 * tables.dim * bags
    forward, backward = stored + batch, 2 * stored + batch
    return {"forward": forward, "eval": forward, "backward": backward, "step": forward + backward}


Times = list[dict[str, list[float]]]


def _times(
    variants: dict[str, Variant],
    batches: list[Batch],
    gradient: Tensor,
    runs: int,
    steps: int,
    device: torch.device,
) -> dict[str, Times]:
    """Returns, per variant and run, milliseconds of steps by phase, on the slowest rank.

    Variants take turns, so that a ratio of two holds on a busy machine: on a CPU after each step, on a GPU after each
    run.
    """
    at_once = steps if device.type == "cuda" else 1
    times: dict[str, Times] = {name: [{} for _ in range(runs)] for name in variants}
    for run in range(runs):
        for first in range(0, steps, at_once):
            chosen = [batches[(run * steps + first + i) % len(batches)] for i in range(at_once)]
            for name, variant in variants.items():
                spent = burst(variant, chosen, gradient, device) | burst_of_eval(variant, chosen, device)
                for phase, ms in spent.items():
                    times[name][run].setdefault(phase, []).extend(ms)
    for of_runs in times.values():
        for of_run in of_runs:
            for phase, ms in of_run.items():
                slowest = torch.tensor(ms, dtype=torch.float64, device=device)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                of_run[phase] = slowest.tolist()
    return times


def _summary(times: Times, of_full: Times | None, required: dict[str, float], copy_gb_s: float) -> dict[str, Any]:
    """Per phase: percentiles of all steps, GB/s of the required bytes, and the ratio of the runs' medians to full."""
    summary: dict[str, Any] = {}
    for phase in _PHASES:
        steps = torch.tensor([ms for run in times for ms in run[phase]], dtype=torch.float64)
        p20, p50, p80 = steps.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        gb_s = required[phase] / p50 / 1e6
        of_phase = {"p20_ms": round(p20, 4), "p50_ms": round(p50, 4), "p80_ms": round(p80, 4)}
        of_phase |= {"required_bytes": round(required[phase]), "gb_s": round(gb_s, 3)}
        summary[phase] = {**of_phase, "to_copy": round(gb_s / copy_gb_s, 4), "to_full": None, "to_full_spread": None}
        if of_full:
            ratios = [
                statistics.median(own[phase]) / statistics.median(full[phase])
                for own, full in zip(times, of_full, strict=True)
            ]
            summary[phase]["to_full"] = round(statistics.median(ratios), 3)
            summary[phase]["to_full_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    for name in ("wall", "processor"):
        summary[f"step_{name}_p50_ms"] = round(statistics.median(ms for run in times for ms in run[name]), 4)
    return summary


def _described(name: str, variant: Variant, traffic: Traffic) -> dict[str, Any]:
    tables = variant.tables
    return {
        "variant": name,
        "plan": variant.plan,
        "num_tables": len(tables.sizes),
        "num_ids": _one_or_all(tables.sizes),
        "stored_rows": sum(
            n if p is None else sum(p.sizes) for n, p in zip(tables.sizes, variant.partitions, strict=True)
        ),
        "dim": tables.dim,
        "optimizer": tables.optimizer,
        "bags": traffic.bags,
        "hot": _one_or_all(traffic.ids_per_bag),
        "zipf": traffic.exponent,
    }


def _one_or_all(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _sent(variant: Variant, batch: Batch, gradient: Tensor) -> Counter[str]:
    """Bytes of a step that this rank sends to others, by kind; ``to_other_nodes`` are those of all but all-reduces."""
    with _counting() as bytes_of:
        variant.step(batch, gradient)
    return bytes_of


@contextmanager
def _counting() -> Iterator[Counter[str]]:
    bytes_of: Counter[str] = Counter()
    rank, local_size = dist.get_rank(), get_local_size()
    all_to_all, all_reduce, all_gather, isend = dist.all_to_all_single, dist.all_reduce, dist.all_gather, dist.isend

    def count(kind: str, to: int, num_bytes: int) -> None:
        bytes_of[kind] += num_bytes * (to != rank)
        bytes_of["to_other_nodes"] += num_bytes * (to // local_size != rank // local_size)

    def ranks_of(given: dict[str, Any]) -> list[int]:
        return dist.get_process_group_ranks(given.get("group") or dist.GroupMember.WORLD)

    def kind_of(tensor: Tensor) -> str:
        return "float" if tensor.is_floating_point() else "int"

    def counted(*a: Any, **k: Any) -> Any:
        given = inspect.signature(all_to_all).bind(*a, **k).arguments
        tensor, ranks = given["input"], ranks_of(given)
        splits = given.get("input_split_sizes") or [1] * len(ranks)
        for to, split in zip(ranks, splits, strict=True):
            count(kind_of(tensor), to, tensor.nbytes // max(sum(splits), 1) * split)
        return all_to_all(*a, **k)

    def counted_send(*a: Any, **k: Any) -> Any:
        given = inspect.signature(isend).bind(*a, **k).arguments
        to = given["dst"] if given.get("dst") is not None else ranks_of(given)[given["group_dst"]]
        count(kind_of(given["tensor"]), to, given["tensor"].nbytes)
        return isend(*a, **k)

    def counted_gather(*a: Any, **k: Any) -> Any:
        given = inspect.signature(all_gather).bind(*a, **k).arguments
        for to in ranks_of(given):
            count("all_gather", to, given["tensor"].nbytes)
        return all_gather(*a, **k)

    def counted_reduce(tensor: Tensor, *a: Any, **k: Any) -> Any:
        bytes_of["all_reduce"] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *a, **k)

    dist.all_to_all_single, dist.all_reduce = counted, counted_reduce
    dist.all_gather, dist.isend = counted_gather, counted_send
    try:
        yield bytes_of
    finally:
        dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce
        dist.all_gather, dist.isend = all_gather, isend
