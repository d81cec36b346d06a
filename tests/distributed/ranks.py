"""Calls a function on real ranks, one process and thread each: by default of gloo, in processes that tests share."""

import multiprocessing as mp
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from time import monotonic
from typing import Any, NoReturn

import torch

from tests.distributed.rank_process import DEVICE, Call, serve

# Ranks are forked from a server that has imported the stack once: importing it takes longer than most tests.
_FORKED = mp.get_context("forkserver")
_FORKED.set_forkserver_preload(["torchrec_qr.distributed", "torchrec.distributed.model_parallel"])
# Start ranks with a GPU afresh, because CUDA does not survive a fork from a process that has counted the devices.
_CONTEXTS: dict[str, Any] = {"cpu": _FORKED, "cuda": mp.get_context("spawn")}

_SECONDS_UNTIL_A_DEATH_SHOWS = 1.0


@dataclass
class _Rank:
    process: Any
    connection: Connection

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


# Rank r of every world takes the process r.
_shared: list[_Rank] = []


def device_of(rank: int) -> torch.device:
    """Returns the device of a rank: a CPU, unless `run_ranks` was told otherwise."""
    device = torch.device(os.environ.get(DEVICE, "cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", rank % torch.cuda.device_count())
    return device


def own_device() -> torch.device:
    """Returns the device of this rank."""
    return device_of(int(os.environ.get("RANK", "0")))


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    local_world_size: int | None = None,
    timeout: float = 120,
    backend: str | Callable[[], str] = "gloo",
    device: str = "cpu",
    alone: bool = False,
) -> list[Any]:
    """Returns ``[function(rank, world_size, *args) for each rank]``, called in as many processes.

    ``function`` is a module's top-level function; it and its results must pickle. ``local_world_size`` simulates nodes
    of so many ranks. The first rank to fail ends the others, and its traceback is raised. ``backend`` may be a function
    that registers one, and returns its name. ``device`` "cuda" gives ranks the GPUs in turn, "cuda:0" all of them one.

    Calls on gloo and CPUs share processes, each call with a process group of its own. A process puts back what a call
    may have changed, and a call fails if it has replaced functions or keeps errors back. A call that fails ends its
    processes. ``alone`` gives a call processes of its own, which end with it.
    """
    shared = backend == "gloo" and device == "cpu" and not alone
    ranks = _processes(world_size) if shared else [_start(device) for _ in range(world_size)]
    succeeded = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            for rank, process in enumerate(ranks):
                environment = {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_RANK": str(rank % (local_world_size or world_size)),
                    "LOCAL_WORLD_SIZE": str(local_world_size or world_size),
                    DEVICE: device,
                }
                call = Call(environment, f"{folder}/store", backend, bytes(ForkingPickler.dumps((function, args))))
                process.connection.send((list(sys.path), call))
            results = _results(ranks, monotonic() + timeout)
        succeeded = True
        return results
    finally:
        if not (shared and succeeded):
            for process in ranks:
                process.end()


def _start(device: str) -> _Rank:
    context = _CONTEXTS[device.partition(":")[0]]
    connection, other_end = context.Pipe()
    process = context.Process(target=serve, args=(other_end,), daemon=True)
    process.start()
    other_end.close()
    return _Rank(process, connection)


def _processes(world_size: int) -> list[_Rank]:
    for r in range(world_size):
        if r == len(_shared):
            _shared.append(_start("cpu"))
        elif not _shared[r].process.is_alive():
            _shared[r] = _start("cpu")
    return _shared[:world_size]


def _results(ranks: list[_Rank], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    pending = {process.connection: rank for rank, process in enumerate(ranks)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} have not ended")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                failed, value = connection.recv()
            except EOFError:
                _raise_death(rank, ranks)
            if failed:
                _raise_a_death(pending.values(), ranks)
                raise AssertionError(f"rank {rank} of {len(ranks)}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _raise_a_death(pending: Iterable[int], ranks: list[_Rank]) -> None:
    """Raises the death of a rank, because it breaks the connections of the others, and their errors may come first."""
    ranks_of = {ranks[rank].process.sentinel: rank for rank in pending}
    for sentinel in wait(list(ranks_of), timeout=_SECONDS_UNTIL_A_DEATH_SHOWS):
        _raise_death(ranks_of[sentinel], ranks)


def _raise_death(rank: int, ranks: list[_Rank]) -> NoReturn:
    ranks[rank].process.join()
    raise RuntimeError(f"rank {rank} died with exit code {ranks[rank].process.exitcode}") from None
