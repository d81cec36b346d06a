"""Steps on fake tensors of device "cuda": what the host does in them, and where, without a GPU.

FakeTensorMode knows the device of every tensor and refuses operations over several. On top of it `Recorder` sees every
operation before it is done, and notes host synchronisations, blocking copies and launches. The values of integers are
computed beside, on the CPU, so that a host that waits for a number gets it and goes on.

Import `noop_cuda` and call ``load`` before this module.
"""

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from fake_memory import INTEGERS, Memory
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from torchrec_qr.ops import feature_lookup, lookup


def _folder(package: str) -> str:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin.removesuffix("__init__.py")


LIBRARIES = {package: _folder(package) for package in ("torchrec_qr", "torchrec", "fbgemm_gpu")}
# The parts of the library that may ask for addresses: they hand them to kernels.
LAUNCHERS = tuple(LIBRARIES["torchrec_qr"] + part for part in ("ops/backends/triton.py", "ops/triton_kernels/"))

SYNC, BLOCKING, LAUNCH, COLLECTIVE = "host synchronisations", "blocking copies", "launches", "collectives"
CALL = "dispatcher calls"
KINDS = (SYNC, BLOCKING, LAUNCH, COLLECTIVE, CALL)

# Operations that neither launch nor wait: views, and memory that is only claimed.
_VIEWS_AND_CLAIMS = """
    alias as_strided detach diagonal dim device empty empty_like empty_strided expand is_contiguous is_pinned
    is_non_overlapping_and_dense is_strides_like_format layout lift_fresh narrow new_empty new_empty_strided numel
    permute reshape resize_ select slice set_ size split split_with_sizes squeeze stride sym_numel sym_size
    sym_storage_offset sym_stride t transpose unbind unfold unsqueeze view _reshape_alias _unsafe_view
"""
_FREE = frozenset(_VIEWS_AND_CLAIMS.split())
_DRAWN = {"uniform_", "normal_", "bernoulli_", "random_", "exponential_"}


class DevicePointerOnHostError(AssertionError):
    """The host asks for the address of device memory, which only the Triton backend may, to hand it on."""


# Kernels whose first argument are ids, which become 0, because every table has that one.
_WRITE_IDS = ("send_ids",)


class WrongDeviceError(AssertionError):
    """A launch of tensors that do not lie on the current device, where kernels run."""


def site() -> tuple[str, str]:
    """The library that the running operation comes from, and the file and function: the innermost of a library.

    ("torch", "autograd") where autograd runs it by itself.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for library, folder in LIBRARIES.items():
            if path.startswith(folder):
                # Without comprehensions, which are functions of their own up to Python 3.11.
                names = [n for n in frame.f_code.co_qualname.split(".") if not n.startswith("<")]
                return library, f"{path.removeprefix(folder)}:{'.'.join(names)}"
        frame = frame.f_back
    return "torch", "autograd"


class Counts:
    """How often each kind of thing happened: ``of[kind][library, place]``."""

    def __init__(self) -> None:
        self.of: dict[str, Counter[tuple[str, str]]] = {kind: Counter() for kind in KINDS}

    def add(self, kind: str, what: str) -> None:
        library, place = site()
        self.of[kind][library, f"{place} {what}"] += 1

    def clear(self) -> None:
        for counter in self.of.values():
            counter.clear()

    def by_library(self) -> dict[str, dict[str, dict[str, int]]]:
        """Returns ``of`` with the library first: ``[library][kind][place]``."""
        out: dict[str, dict[str, dict[str, int]]] = {}
        for kind, counter in self.of.items():
            for (library, place), number in sorted(counter.items()):
                out.setdefault(library, {}).setdefault(kind, {})[place] = number
        return out


class Devices:
    """The current device, which is a thread's own, as the library of `noop_cuda` keeps it.

    Attributes:
        with_events: those that were current when an event was recorded.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.with_events: set[int] = set()

    def current(self) -> int:
        return int(self._library.current_device())

    def exchange(self, index: int) -> int:
        return -1 if index < 0 else int(self._library.exchange_device(index))


class Recorder(TorchDispatchMode):
    """Notes what a step costs the host, and computes integers beside."""

    def __init__(self, mode: FakeTensorMode, memory: Memory, counts: Counts) -> None:
        super().__init__()
        self._mode = mode
        self._memory, self._counts = memory, counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "aten":
            # Below autograd operations come whole that are made of others, such as ``to`` of a copy.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if name != "lift_fresh":
            args, kwargs = pytree.tree_map_only(Tensor, self._as_fake, (args, kwargs))
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if namespace == "c10d":
            self._counts.add(COLLECTIVE, name.strip("_"))
            self._exchanged(name, args)
            return func(*args, **kwargs)
        if name == "is_pinned":
            return self._memory.is_pinned(args[0])
        if name in _DRAWN:
            return args[0]  # a build without CUDA has no generator for it
        if name == "_coalesce":
            # How many rows are left is the device's to say. Here they are as many as before.
            self._counts.add(SYNC, "coalesce")
            return args[0]._coalesced_(True)
        if name in ("pin_memory", "_pin_memory"):
            with self:
                out = args[0].clone()
            self._memory.pin(out)
            return out
        if name != "device":  # which only a fake tensor asks of the dispatcher
            self._counts.add(CALL, name)
        self._note(name, args, kwargs, tensors)
        return self._run(func, args, kwargs, tensors)

    def _as_fake(self, tensor: Tensor) -> Tensor:
        """A tensor that was made outside, such as the class map of a config, with its values."""
        if isinstance(tensor, FakeTensor):
            return tensor
        fake = self._mode.from_tensor(tensor)
        if fake.dtype in INTEGERS:
            self._memory.write(fake, tensor)
        return fake

    def _note(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        devices = {t.device.type for t in tensors}
        target = kwargs.get("device")
        if target is not None:
            devices.add(torch.device(target).type)
        if "cuda" not in devices or name in _FREE:
            return
        if name in ("_to_copy", "copy_") and devices >= {"cpu", "cuda"}:
            asynchronous = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            on_host = [t for t in tensors if t.device.type == "cpu"]
            direction = "to the host" if tensors[-1].device.type == "cuda" else "to the device"
            if not asynchronous:
                self._counts.add(BLOCKING, direction)
            elif not all(map(self._memory.is_pinned, on_host)):
                self._counts.add(BLOCKING, f"{direction}, by memory that is not pinned")
            return
        if name == "_local_scalar_dense":
            self._counts.add(SYNC, "item")
            return
        self._counts.add(LAUNCH, "aten")

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        for t in tensors:
            if isinstance(t, FakeTensor):
                t.constant = None  # a copy of a constant would be made on a real device
        name = func._schema.name.split("::")[1]
        values = None
        mutated = _mutated(func, args, kwargs)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            device = next(t.device for t in tensors)
            if device.type == "cuda" and name != "_local_scalar_dense":
                self._counts.add(SYNC, name.strip("_"))
            values = self._values(func, args, kwargs)
            if not isinstance(values, Tensor | tuple | list):
                return values
            out = pytree.tree_map(
                lambda v: torch.empty(v.shape, dtype=v.dtype, device=device) if isinstance(v, Tensor) else v, values
            )
        made = pytree.tree_leaves(out)
        if any(isinstance(t, Tensor) and t.is_sparse for t in (*made, *tensors)):
            return out
        before = {t.untyped_storage()._cdata for t in tensors}
        new = [isinstance(t, Tensor) and t.untyped_storage()._cdata not in before for t in made]
        for t in (t for t, is_new in zip(made, new, strict=True) if is_new):
            self._memory.forget(t)
            # A copy to the host that does not wait is into memory that ATen has pinned.
            to_host = name == "_to_copy" and t.device.type == "cpu" and tensors[0].device.type == "cuda"
            if kwargs.get("pin_memory") or (to_host and kwargs.get("non_blocking")):
                self._memory.pin(t)
        if not any(isinstance(t, Tensor) and t.dtype in INTEGERS for t in (*made, *mutated)):
            return out
        if values is None:
            values = self._values(func, args, kwargs)
        for t, v, is_new in zip(made, pytree.tree_leaves(values), new, strict=True):
            if is_new and t.dtype in INTEGERS and isinstance(v, Tensor):
                self._memory.write(t, v)
        return out

    def _values(self, func: Any, args: Any, kwargs: Any) -> Any:
        def beside(a: Any) -> Any:
            if isinstance(a, FakeTensor):
                return self._memory.values(a)
            return torch.device("cpu") if isinstance(a, torch.device) else a

        with no_dispatch():
            args, kwargs = pytree.tree_map(beside, (args, kwargs))
            kwargs.pop("pin_memory", None)
            return func(*args, **kwargs)

    def _exchanged(self, name: str, args: Any) -> None:
        """Writes the integers that this rank, the first, receives where all ranks have the same batch."""
        if name not in ("alltoall_base_", "_allgather_base_") or args[0].dtype not in INTEGERS:
            return  # a reduction leaves masks and sums as the rank's own
        out, given, group = args[:3]
        own = self._memory.values(given)
        with no_dispatch():
            if name == "alltoall_base_":
                own = own.split(args[4] or len(own) // dist.ProcessGroup.unbox(group).size())[0]
            if out.numel():
                self._memory.values(out).copy_(own.repeat(out.numel() // own.numel()))


def _mutated(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for t in pytree.tree_leaves(written) if isinstance(t, Tensor)]


class FakeCuda:
    """Puts, for the rest of the process, fakes where the library asks torch or Triton for what only CUDA has."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.counts, self.memory, self.devices = Counts(), Memory(), Devices(library)
        # One for the process, because the library keeps tensors over steps.
        self._mode = FakeTensorMode()
        self._install_tensors()
        self._install_devices()

    @contextmanager
    def tensors(self) -> Iterator[None]:
        """Within, every tensor is a fake one, and what is done is noted in ``counts``."""
        with self._mode, Recorder(self._mode, self.memory, self.counts):
            yield

    def _install_tensors(self) -> None:
        memory, counts = self.memory, self.counts

        def data_ptr(tensor: FakeTensor) -> int:
            code = sys._getframe(1).f_code
            if tensor.device.type == "cuda" and not code.co_filename.startswith(LAUNCHERS):
                raise DevicePointerOnHostError(f"{site()[1]}: data_ptr() of a tensor on {tensor.device}")
            return memory.address(tensor)

        def tolist(tensor: FakeTensor) -> Any:
            if tensor.device.type == "cuda":
                counts.add(SYNC, "tolist")
            values = memory.values(tensor)
            with no_dispatch():
                return values.tolist()

        FakeTensor.data_ptr = data_ptr
        FakeTensor.tolist = tolist
        FakeTensor.record_stream = lambda tensor, stream: None
        # Look up as a step without a compiler does, not by operators, whose fakes hide the backend.
        lookup.is_traced = feature_lookup.is_traced = lambda *tensors: False

    def _install_devices(self) -> None:
        counts, devices, memory = self.counts, self.devices, self.memory

        class Event:
            """Is complete as soon as it is asked; who waits without asking waits for the device."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self._asked = False

            def record(self, stream: Any = None) -> None:
                devices.with_events.add(devices.current())

            def wait(self, stream: Any = None) -> None:
                pass

            def query(self) -> bool:
                self._asked = True
                return True

            def synchronize(self) -> None:
                if not self._asked:
                    counts.add(SYNC, "event")

        class Stream:
            """The only one: whoever waits for it waits for the device."""

            cuda_stream = 0

            def synchronize(self) -> None:
                counts.add(SYNC, "stream")

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            name = kernel.fn.__name__
            counts.add(LAUNCH, name)
            if not all(type(size) is int for size in grid):
                raise AssertionError(f"{name}: a grid of {grid}; allowed: integers of the host")
            placed = {t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
            if placed != {torch.device("cuda", devices.current())}:
                raise WrongDeviceError(f"{name}: tensors on {placed}; launched on cuda:{devices.current()}")
            if name in _WRITE_IDS:
                with no_dispatch():
                    memory.write(args[0], torch.zeros(args[0].shape, dtype=args[0].dtype))

        cuda: Any = torch.cuda
        cuda.current_device = devices.current
        cuda._exchange_device = cuda._maybe_exchange_device = devices.exchange
        cuda.set_device = lambda device: devices.exchange(torch.device("cuda", device).index)
        cuda.get_device_capability = lambda device=None: (9, 0)
        cuda.is_current_stream_capturing = lambda: False
        cuda.current_stream = lambda device=None: Stream()
        cuda.synchronize = lambda device=None: counts.add(SYNC, "synchronize")
        cuda.Event = Event
        JITFunction.run = launch
