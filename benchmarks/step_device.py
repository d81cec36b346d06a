"""Measures times, memory and copies of a rank's device, for the step benchmark.

On a CPU a moment is read from the processor's clock, and ranks meet at the end of every step. On a GPU it is an event
of the stream, and a burst of steps is queued without waiting between them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.step_cells import Batch
from benchmarks.step_variant import Variant

_COPIED = 2**28  # bytes: more than caches hold


def burst(variant: Variant, batches: Sequence[Batch], gradient: Tensor, device: torch.device) -> dict[str, list[float]]:
    """Runs a step on each batch; returns milliseconds of each: of ``forward``, ``backward`` and both, the ``step``.

    The wall time and the time of this process's threads are the burst's, divided by its number of steps.
    """
    _meet(device)
    wall, processor = time.perf_counter(), time.process_time()
    marks = []
    for batch in batches:
        start = _mark(device)
        out = variant.out(batch)
        middle = _mark(device)
        variant.backward(out, gradient)
        _end_of_step(device)
        marks.append((start, middle, _mark(device)))
    _settle(device)
    spent = time.perf_counter() - wall, time.process_time() - processor
    return {
        "forward": [_ms(a, b) for a, b, _ in marks],
        "backward": [_ms(b, c) for _, b, c in marks],
        "step": [_ms(a, c) for a, _, c in marks],
        **{key: [1e3 * t / len(batches)] for key, t in zip(("wall", "processor"), spent, strict=True)},
    }


def burst_of_eval(variant: Variant, batches: Sequence[Batch], device: torch.device) -> dict[str, list[float]]:
    """Looks up each batch without gradients; returns milliseconds of each."""
    _meet(device)
    marks = []
    with torch.no_grad():
        for batch in batches:
            start = _mark(device)
            variant.out(batch)
            _end_of_step(device)
            marks.append((start, _mark(device)))
    _settle(device)
    return {"eval": [_ms(a, b) for a, b in marks]}


def copy_gb_s(device: torch.device, repetitions: int = 11) -> float:
    """Returns GB/s of a copy that no cache holds, reads and writes counted, while all ranks copy."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(repetitions):
        _meet(device)
        start = _mark(device)
        target.copy_(source)
        end = _mark(device)
        _settle(device)
        times.append(_ms(start, end))
    return 2 * _COPIED / statistics.median(times) / 1e6


def peak_of(function: Callable[[], Any], device: torch.device) -> tuple[float | None, float | None]:
    """Returns the peak of this rank's memory in MB, and how far it is above what there is before.

    On a GPU: what PyTorch has allocated there. On a CPU: the resident memory of the process; None where the system
    does not reset its peak.
    """
    if device.type == "cuda":
        _settle(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _settle(device)
        peak = torch.cuda.max_memory_allocated(device)
        return round(peak / 1e6, 1), round((peak - before) / 1e6, 1)
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        function()
        return None, None
    function()
    peak = _status("VmHWM")
    return round(peak / 1e3, 1), round((peak - before) / 1e3, 1)


def _meet(device: torch.device) -> None:
    _settle(device)
    dist.barrier()
    _settle(device)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _end_of_step(device: torch.device) -> None:
    if device.type != "cuda":
        dist.barrier()


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms(start: Any, end: Any) -> float:
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))
