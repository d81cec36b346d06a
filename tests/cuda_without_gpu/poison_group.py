"""A process group on a CPU whose collectives order memory as NCCL's do, so that a missing wait shows.

To the host, NCCL's collectives are complete as soon as they are issued. Their results may be read after a wait for that
very work or future, or in a callback of that very future. A future made of others carries no such order.

Here gloo computes the result aside, and the destination holds poison until somebody waits. Floats are NaN, and integers
a value that no count, id or mask has. A reader that does not wait computes with poison.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "poison"
_BYTE = 0xA5


@dataclass(frozen=True)
class Collective:
    """One collective of one rank. ``sent`` and ``received`` are elements, per peer where peers differ."""

    kind: str
    group: tuple[int, ...]
    dtype: str
    sent: tuple[int, ...]
    received: tuple[int, ...]


@dataclass
class Journal:
    """The collectives of this process since `clear`, and what was done to tensors that were under way."""

    issued: list[Collective] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.issued.clear()
        self.violations.clear()


JOURNAL = Journal()


class _Work(dist._Work):
    """A work that is complete at once. Its values arrive in the destinations when somebody waits (`land`).

    Args:
        name: says which collective it is, where something is wrong with it.
        aside: gloo's work, which writes ``results``.
        sources: what is sent, with a copy of it from before.
    """

    def __init__(
        self,
        name: str,
        aside: Any,
        destinations: list[Tensor],
        results: list[Tensor],
        sources: list[tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self._name, self._aside, self._sources = name, aside, sources
        self.outputs = list(destinations)
        self._destinations, self._results = destinations, results
        self._landed = False
        for destination in destinations:
            _fill_with_poison(destination)

    def land(self) -> None:
        if self._landed:
            return
        self._landed = True
        self._aside.wait()
        for source, before in self._sources:
            if not torch.equal(_bits(source), _bits(before)):
                JOURNAL.violations.append(f"{self._name}: its input was changed before anybody waited")
        for destination, result in zip(self._destinations, self._results, strict=True):
            if not _is_poison(destination):
                JOURNAL.violations.append(f"{self._name}: its output was written to before anybody waited")
            destination.detach().copy_(result.view_as(destination))
        self._sources, self._destinations, self._results = [], [], []

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.land()
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def get_future(self) -> "_Future":
        # Land where DDP's own C++ asks, because it takes the future apart from this class, and its wait is NCCL's.
        if sys._getframe(1).f_code.co_name == "_engine_run_backward":
            self.land()
        return _Future(self)


class _Future(torch.futures.Future):  # type: ignore[type-arg]
    """A future that is complete from the start. Only its own `wait` and callbacks see the values."""

    def __init__(self, work: _Work) -> None:
        super().__init__()
        self._work = work
        self.set_result(work.outputs)

    def wait(self) -> Any:
        self._work.land()
        return super().wait()

    def then(self, callback: Callable[[Any], Any]) -> Any:
        def landed(future: Any) -> Any:
            self._work.land()
            return callback(future)

        return super().then(landed)

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        self._work.land()
        super().add_done_callback(callback)


class PoisonGroup(dist.ProcessGroup):
    """See the module. ``options`` are those that ``torch.distributed`` hands to the maker of a backend."""

    def __init__(self, options: Any) -> None:
        super().__init__(options.group_rank, options.group_size)
        self._rank, self._size, self._ranks = (
            options.group_rank,
            options.group_size,
            tuple(options.global_ranks_in_group or range(options.group_size)),
        )
        self._gloo = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)
        self._name = options.group_id

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        copies = _copies(tensors)
        return self._work("allreduce", tensors, copies, self._gloo.allreduce(copies, *_given(opts)))

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        copies = _copies(tensors)
        return self._work("broadcast", tensors, copies, self._gloo.broadcast(copies, *_given(opts)))

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> _Work:
        result, sent = torch.empty_like(output), input.detach().clone()
        aside = self._gloo.alltoall_base(result, sent, output_splits, input_splits, *_given(opts))
        sizes = self._elements(input, input_splits), self._elements(output, output_splits)
        return self._work("alltoall", [output], [result], aside, [(input, sent)], sizes)

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> _Work:
        result, sent = torch.empty_like(output), input.detach().clone()
        aside = self._gloo._allgather_base(result, sent, *_given(opts))
        return self._work("allgather", [output], [result], aside, [(input, sent)])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _Work:
        results, sent = [[torch.empty_like(t) for t in of] for of in outputs], _copies(inputs)
        aside = self._gloo.allgather(results, sent, *_given(opts))
        return self._work("allgather", *_flat(outputs, results), aside, list(zip(inputs, sent, strict=True)))

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any = None) -> _Work:
        result, sent = torch.empty_like(output), input.detach().clone()
        aside = self._gloo._reduce_scatter_base(result, sent, *_given(opts))
        return self._work("reduce_scatter", [output], [result], aside, [(input, sent)])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> _Work:
        results, sent = [torch.empty_like(t) for t in outputs], [_copies(of) for of in inputs]
        aside = self._gloo.reduce_scatter(results, sent, *_given(opts))
        sources = [pair for of, copies in zip(inputs, sent, strict=True) for pair in zip(of, copies, strict=True)]
        return self._work("reduce_scatter", outputs, results, aside, sources)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _Work:
        results, sent = [[torch.empty_like(t) for t in of] for of in outputs], _copies(inputs)
        aside = self._gloo.gather(results, sent, *_given(opts))
        return self._work("gather", *_flat(outputs, results), aside, list(zip(inputs, sent, strict=True)))

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> _Work:
        results, sent = [torch.empty_like(t) for t in outputs], [_copies(of) for of in inputs]
        return self._work("scatter", outputs, results, self._gloo.scatter(results, sent, *_given(opts)))

    def barrier(self, opts: Any = None) -> _Work:
        return self._work("barrier", [], [], self._gloo.barrier(*_given(opts)))

    # Newer versions of torch call them so.
    all_to_all_single = alltoall_base
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base

    def _work(
        self,
        kind: str,
        destinations: list[Tensor],
        results: list[Tensor],
        aside: Any,
        sources: list[tuple[Tensor, Tensor]] = [],  # noqa: B006
        sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> _Work:
        tensors = destinations or [source for source, _ in sources]
        dtype = str(tensors[0].dtype) if tensors else ""
        if sizes is None:
            sizes = tuple(s.numel() for s, _ in sources), tuple(d.numel() for d in destinations)
        JOURNAL.issued.append(Collective(kind, self._ranks, dtype, *sizes))
        return _Work(f"{kind} over ranks {self._ranks}", aside, destinations, results, sources)

    def _elements(self, tensor: Tensor, splits: list[int]) -> tuple[int, ...]:
        """Returns how many elements go to, or come from, each rank."""
        if not splits:
            return (tensor.numel() // self._size,) * self._size
        return tuple(n * (tensor.numel() // len(tensor) if len(tensor) else 0) for n in splits)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    @property
    def group_name(self) -> str:
        return self._name

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def getRank(self) -> int:  # noqa: N802
        return self._rank

    def getSize(self) -> int:  # noqa: N802
        return self._size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def register() -> str:
    """Registers a backend of ``torch.distributed`` in this process, and returns its name."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            BACKEND, lambda options, _: PoisonGroup(options), extended_api=True, devices=["cpu"]
        )
    return BACKEND


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def _flat(outputs: list[list[Tensor]], results: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [t for of in outputs for t in of], [t for of in results for t in of]


def _given(options: Any) -> tuple[Any, ...]:
    return () if options is None else (options,)


def _bits(tensor: Tensor) -> Tensor:
    """Returns the bytes, because a NaN does not equal itself."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _poison_of(dtype: torch.dtype) -> float | int:
    """Counts, ids and lengths are not negative, and bytes are 0 or 1, or characters of a pickled object."""
    if dtype.is_floating_point:
        return float("nan")
    if dtype in (torch.uint8, torch.bool):
        return _BYTE
    return torch.iinfo(dtype).min // 2 - 1


def _fill_with_poison(tensor: Tensor) -> None:
    if tensor.numel():
        tensor.detach().fill_(_poison_of(tensor.dtype))


def _is_poison(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return bool(tensor.detach().isnan().all())
    return bool((tensor.detach() == _poison_of(tensor.dtype)).all())
