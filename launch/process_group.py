"""The processes of a job, as torchrun, TorchX or nobody started them."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from launch.devices import check_started_by_launcher, compare_gpus, fill_environment, gpu_name, own_device
from launch.sections import TrainSection
from launch.waits import step_timeout

T = TypeVar("T")


def start_process_group(train: TrainSection | None = None) -> torch.device:
    """Joins the ranks of the environment, or makes this process the only rank if there is none; returns its device.

    Args:
        train (TrainSection | None): of the job, which may have a time-out.

    Raises:
        DeviceError: ranks and GPUs of a node do not fit together, or each rank would train by itself.
    """
    check_started_by_launcher(os.environ)
    fill_environment()
    device = own_device(os.environ)
    timeout = step_timeout(train or TrainSection(), device)
    if "MASTER_PORT" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    else:
        store, rank, world_size = dist.TCPStore("127.0.0.1", 0, 1, is_master=True), 0, 1
    store.set_timeout(timeout)
    if device.type == "cuda":
        compare_gpus(store, rank, world_size, gpu_name(device))
    ranks = {"store": dist.PrefixStore("default_pg", store), "rank": rank, "world_size": world_size}
    dist.init_process_group(**ranks, **group_arguments(device, timeout))
    return device


def group_arguments(device: torch.device, timeout: timedelta) -> dict[str, Any]:
    """Returns the arguments of ``init_process_group`` beside the ranks.

    With the device, NCCL connects at once, so that a wrong mapping of ranks to GPUs is an error of the start. A barrier
    need not guess then.

    Example:
        >>> group_arguments(torch.device("cuda", 3), timedelta(minutes=10))
        {'backend': 'nccl', 'timeout': datetime.timedelta(seconds=600), 'device_id': device(type='cuda', index=3)}
        >>> group_arguments(torch.device("cpu"), timedelta(minutes=2))
        {'backend': 'gloo', 'timeout': datetime.timedelta(seconds=120)}
    """
    arguments: dict[str, Any] = {"backend": "nccl" if device.type == "cuda" else "gloo", "timeout": timeout}
    return arguments | ({"device_id": device} if device.type == "cuda" else {})


def from_rank_0(action: Callable[[], T], group: dist.ProcessGroup, *errors: type[Exception]) -> T:
    """Returns on every rank what ``action`` returns on rank 0, or raises its error. All ranks must call it.

    Args:
        action (Callable[[], T]): called on rank 0 alone.
        group (ProcessGroup): of all ranks, on the hosts.
        errors (type[Exception]): those that reach every rank.
    """
    outcomes: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcomes = [action()]
        except errors as error:
            outcomes = [error]
    dist.broadcast_object_list(outcomes, src=0, group=group)
    if isinstance(outcomes[0], Exception):
        raise outcomes[0]
    return cast(T, outcomes[0])
