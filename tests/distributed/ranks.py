"""Runs a function on real ranks, of gloo unless said otherwise: one process each, one thread each."""

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

import torch

# Set where `run_ranks` is told another device than a CPU: "cuda:0", or "cuda" for GPUs in turn.
_DEVICE = "TORCHREC_QR_RANK_DEVICE"
# Ranks are forked from a server that has imported the stack once: importing it takes longer than most tests.
_FORKED = mp.get_context("forkserver")
_FORKED.set_forkserver_preload(["torchrec_qr.distributed", "torchrec.distributed.model_parallel"])
# Start ranks with a GPU afresh, because CUDA does not survive a fork from a process that has counted the devices.
_CONTEXTS: dict[str, Any] = {"cpu": _FORKED, "cuda": mp.get_context("spawn")}


def device_of(rank: int) -> torch.device:
    """Returns the device of a rank: a CPU, unless `run_ranks` was told otherwise."""
    device = torch.device(os.environ.get(_DEVICE, "cpu"))
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
) -> list[Any]:
    """Returns ``[function(rank, world_size, *args) for each rank]``, run in as many processes.

    ``function`` is a module's top-level function; it and its results must pickle. ``local_world_size`` simulates nodes
    of so many ranks. The first rank to fail ends the others, and its traceback is raised. ``backend`` may be a function
    that registers one, and returns its name. ``device`` "cuda" gives ranks the GPUs in turn, "cuda:0" all of them one.
    """
    context = _CONTEXTS[device.partition(":")[0]]
    with tempfile.TemporaryDirectory() as folder:
        ranks: dict[Connection, tuple[int, Any]] = {}
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank % (local_world_size or world_size)),
                "LOCAL_WORLD_SIZE": str(local_world_size or world_size),
                _DEVICE: device,
            }
            target = (sender, environment, f"{folder}/store", backend, function, args)
            process = context.Process(target=_rank, args=target, daemon=True)
            process.start()
            sender.close()
            ranks[receiver] = rank, process
        processes = [process for _, process in ranks.values()]
        try:
            return _results(ranks, monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(ranks: dict[Connection, tuple[int, Any]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    pending = dict(ranks)
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(rank for rank, _ in pending.values())} have not ended")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank, process = pending.pop(connection)
            try:
                failed, value = connection.recv()
            except EOFError:
                process.join()
                raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}") from None
            if failed:
                raise AssertionError(f"rank {rank} of {len(ranks)}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _rank(
    sender: Connection,
    environment: dict[str, str],
    store: str,
    backend: str | Callable[[], str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    try:
        if own_device().type == "cuda":
            torch.cuda.set_device(own_device())
        name = backend if isinstance(backend, str) else backend()
        dist.init_process_group(name, init_method=f"file://{store}", rank=rank, world_size=world_size)
        result = function(rank, world_size, *args)
        dist.barrier()  # nobody leaves while others still talk to it
        sender.send((False, result))
    except BaseException:
        sender.send((True, traceback.format_exc()))
    finally:
        sender.close()
