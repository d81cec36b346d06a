"""Stand-ins for streams on a CPU, without which TorchRec's prefetching and semi-synchronous pipelines do not run there.

All work is done at once, as if there were one stream. So a pipeline's order of lookups, steps and waits for collectives
is its own, and the order between streams is not shown.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch


class HostStream:
    """Takes the place of a ``torch.cuda.Stream``."""

    device = torch.device("cpu")

    def wait_stream(self, other: "HostStream") -> None:
        """Does nothing, because the other's work is done."""

    def wait_event(self, event: torch.cpu.Event) -> None:
        """Does nothing, likewise."""

    def record_event(self) -> torch.cpu.Event:
        return torch.cpu.Event()


_MODULE = SimpleNamespace(
    current_stream=HostStream,
    stream=nullcontext,
    synchronize=lambda: None,
    Event=torch.cpu.Event,
)
_ATTRIBUTES = ("_memcpy_stream", "_data_dist_stream", "_prefetch_stream", "_default_stream")


@contextmanager
def host_streams(pipeline: Any) -> Iterator[None]:
    """Lets a pipeline of TorchRec's, made for a CPU, go the way that it goes with streams."""
    for name in _ATTRIBUTES:
        if hasattr(pipeline, name):
            setattr(pipeline, name, HostStream())
    pipeline._stream_context = nullcontext
    with (
        patch.object(torch, "get_device_module", return_value=_MODULE),
        patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None),
    ):
        yield
