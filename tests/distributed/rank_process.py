"""The process of a rank: it makes one call after another, and nothing of a call is left for the next one."""

import gc
import os
import pickle
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# The variable that names the device of the ranks of a call: "cpu", "cuda:0", or "cuda" for GPUs in turn.
DEVICE = "TORCHREC_QR_RANK_DEVICE"
# The packages of which a call must not leave a function replaced.
_WATCHED = ("torchrec_qr", "torchrec", "launch", "torch.distributed", "torch.nn.parallel")


@dataclass(frozen=True)
class Call:
    """A function and its arguments, pickled, and the world that it is called in."""

    environment: dict[str, str]
    store: str
    backend: str | Callable[[], str]
    function_and_args: bytes


def serve(calls: Connection) -> None:
    """Makes the calls that arrive, until the other end is closed."""
    torch.set_num_threads(1)
    # No collection between calls looks at what was imported before the first one.
    gc.freeze()
    generator = torch.get_rng_state()
    while True:
        try:
            path, call = calls.recv()
        except EOFError:
            return
        sys.path[:] = path
        environment, folder = dict(os.environ), os.getcwd()
        torch.set_rng_state(generator)
        random.seed(0)
        np.random.seed(0)
        with warnings.catch_warnings(), torch.enable_grad():
            outcome = _outcome(call)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.setprofile(None)
        sys.settrace(None)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_num_threads(1)
        calls.send_bytes(outcome)


def _outcome(call: Call) -> bytes:
    """Returns, pickled, whether the call failed, and its result or its traceback."""
    try:
        os.environ.update(call.environment)
        function, args = pickle.loads(call.function_and_args)  # noqa: S301
        before, kept = dict(_functions()), list(_globals_of_torchrec())
        result = _result(call, function, args)
        for module, name, value in kept:
            setattr(module, name, value)
        after = dict(_functions())
        # torch wraps the step of each class of optimizers when it makes the first one, and marks that.
        own = {name for name, value in after.items() if getattr(value, "hooked", False)}
        replaced = sorted(name for name, value in before.items() if after.get(name) is not value and name not in own)
        assert not replaced, f"the call has left functions replaced: {replaced}"
        late_errors = sys.modules.get("torchrec_qr.late_errors")
        assert not (late_errors and late_errors._late), "the call has left errors behind that nothing has raised"
        return bytes(ForkingPickler.dumps((False, result)))
    except BaseException:
        return bytes(ForkingPickler.dumps((True, traceback.format_exc())))


def _result(call: Call, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    rank, world_size = int(call.environment["RANK"]), int(call.environment["WORLD_SIZE"])
    device = torch.device(call.environment[DEVICE])
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count() if device.index is None else device)
    name = call.backend if isinstance(call.backend, str) else call.backend()
    dist.init_process_group(name, init_method=f"file://{call.store}", rank=rank, world_size=world_size)
    result = function(rank, world_size, *args)
    dist.barrier()  # nobody leaves while others still talk to it
    gc.collect()
    dist.destroy_process_group()
    return result


def _globals_of_torchrec() -> Iterator[tuple[ModuleType, str, Any]]:
    """TorchRec remembers groups of processes by these, and what it has settled with the other ranks of the first."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("torchrec."):
            values = list(vars(module).items())
            yield from ((module, name, v) for name, v in values if isinstance(v, bool | int | None))


def _functions() -> Iterator[tuple[str, Any]]:
    """The functions and classes of the watched packages, and the functions of those classes, by name."""
    for module_name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and module_name.startswith(_WATCHED):
            for name, value in list(vars(module).items()):
                # Compare types, because some objects warn when code reads their class.
                if issubclass(type(value), type) and value.__module__ == module_name:
                    yield from ((f"{module_name}.{name}.{n}", v) for n, v in vars(value).items() if callable(v))
                if callable(value):
                    yield f"{module_name}.{name}", value
