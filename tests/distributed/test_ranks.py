"""Ranks are shared by the calls of a test process, and no call sees what an earlier one did."""

import os
import random
import sys
import warnings
from threading import Event
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torchrec.distributed import comm

from torchrec_qr import late_errors
from torchrec_qr.ops.backends import cpu


def process(rank: int, world_size: int) -> int:
    return os.getpid()


def surroundings(rank: int, world_size: int) -> dict[str, Any]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {
        "environment": {name: value for name, value in os.environ.items() if name in names or "LEFT" in name},
        "random": (torch.rand(1).item(), random.random(), np.random.rand()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        "gradients": torch.is_grad_enabled(),
        "ignores warnings": warnings.filters[0] == ("ignore", None, Warning, None, 0),
        "profile": sys.getprofile(),
        "groups": [name for name, value in vars(comm).items() if isinstance(value, dist.ProcessGroup)],
        "group": dist.get_process_group_ranks(dist.group.WORLD),
        "group name": dist.new_group([0]).group_name if rank == 0 else dist.new_group([0]),
    }


def change_all(rank: int, world_size: int) -> None:
    os.environ["LEFT"] = "1"
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    sys.setprofile(lambda *_: None)
    comm.intra_and_cross_node_pg(torch.device("cpu"))
    assert isinstance(comm._INTRA_PG, dist.ProcessGroup)


def test_a_call_finds_what_a_fresh_process_has() -> None:
    fresh = run_ranks(surroundings, 2, alone=True)
    run_ranks(change_all, 2, local_world_size=1)
    assert run_ranks(surroundings, 2) == fresh
    assert fresh[0]["group"] == [0, 1]


def test_worlds_of_several_sizes_share_processes_and_a_call_alone_has_its_own() -> None:
    two = run_ranks(process, 2)
    assert run_ranks(process, 3)[:2] == two == run_ranks(process, 2)
    assert run_ranks(process, 1) == two[:1]
    assert not set(run_ranks(process, 2, alone=True)) & set(two)


def fail(rank: int, world_size: int, how: str) -> None:
    if rank == 1:
        match how:
            case "raises":
                raise KeyError("bad")
            case "exits":
                os._exit(7)
            case "hangs":
                sleep(60)
            case "replaces":
                cpu.backward = None  # type: ignore[assignment]
            case "holds errors back":
                late_errors._late.add(lambda: None, Event())  # type: ignore[arg-type]
    if how != "hangs":
        return
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raises", AssertionError, r"rank 1 of 2:\n(.*\n)+KeyError: 'bad'"),
        ("exits", RuntimeError, "rank 1 died with exit code 7"),
        ("hangs", TimeoutError, r"ranks \[0, 1\] have not ended"),
        ("replaces", AssertionError, r"left functions replaced: \['torchrec_qr.ops.backends.cpu.backward'\]"),
        ("holds errors back", AssertionError, "left errors behind"),
    ],
)
def test_a_call_that_fails_ends_its_processes(how: str, error: type[Exception], message: str) -> None:
    before = run_ranks(process, 3)
    with pytest.raises(error, match=message):
        run_ranks(fail, 2, how, timeout=2 if how == "hangs" else 60)
    after = run_ranks(process, 3)
    assert not set(after[:2]) & set(before)
    assert after[2] == before[2]
