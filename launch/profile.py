"""A trace of some training steps, for ``chrome://tracing`` or Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.profiler import profile, schedule

_WAIT, _WARM_UP, _STEPS = 5, 2, 5  # the first steps are not like the others


@contextmanager
def profiled(folder: Path, enabled: bool) -> Iterator[profile | None]:
    """Yields a profiler, which writes ``trace_rank_<r>.json`` after steps 8 to 12; None if not ``enabled``."""
    if not enabled:
        yield None
        return
    path = folder / f"trace_rank_{dist.get_rank()}.json"
    with profile(
        schedule=schedule(wait=_WAIT, warmup=_WARM_UP, active=_STEPS, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler
