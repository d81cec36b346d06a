"""The device of a rank. A scheduler shows a rank all GPUs of its node, or one alone."""

import os
import socket
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist


class DeviceError(RuntimeError):
    """Ranks and GPUs do not fit together."""


def device_index(local_rank: int, device_count: int, visible: str | None) -> int:
    """Returns the index of a rank's GPU among those that it sees.

    A scheduler may show each rank one GPU only, as Slurm's ``--gpus-per-task=1`` does. That GPU has the index 0 in
    every rank, so LOCAL_RANK does not matter.

    Args:
        local_rank (int): of this process on its node.
        device_count (int): GPUs that PyTorch sees here.
        visible (str | None): the variable CUDA_VISIBLE_DEVICES; None: not set.

    Raises:
        DeviceError: there are fewer GPUs than ranks on the node; names the three and what to do.

    Example:
        >>> device_index(5, 8, None), device_index(5, 1, "0"), device_index(5, 1, "GPU-8f3a")
        (5, 0, 0)
        >>> device_index(1, 1, None)
        Traceback (most recent call last):
        ...
        launch.devices.DeviceError: LOCAL_RANK=1, but this rank sees 1 GPU (CUDA_VISIBLE_DEVICES is not set). Allowed:
        a GPU for each rank of a node. Start at most 1 rank on this node, or show it more GPUs; to show each rank one
        GPU of its own, set CUDA_VISIBLE_DEVICES, as Slurm does by --gpus-per-task=1; for no GPU, set it to -1
    """
    if local_rank < device_count:
        return local_rank
    if device_count == 1 and visible is not None and len(visible.split(",")) == 1:
        return 0
    setting = "is not set" if visible is None else f"= {visible!r}"
    gpus, ranks = (f"{device_count} {thing}{'' if device_count == 1 else 's'}" for thing in ("GPU", "rank"))
    raise DeviceError(
        f"LOCAL_RANK={local_rank}, but this rank sees {gpus} (CUDA_VISIBLE_DEVICES {setting}). Allowed: a GPU for each "
        f"rank of a node. Start at most {ranks} on this node, or show it more GPUs; to show each rank one GPU of its "
        "own, set CUDA_VISIBLE_DEVICES, as Slurm does by --gpus-per-task=1; for no GPU, set it to -1"
    )


def own_device(environment: Mapping[str, str]) -> torch.device:
    """Returns this rank's GPU, made the current one, or the CPU if PyTorch sees no GPU.

    Raises:
        DeviceError: see `device_index`.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = device_index(
        int(environment["LOCAL_RANK"]), torch.cuda.device_count(), environment.get("CUDA_VISIBLE_DEVICES")
    )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_own_gpus(gpus: Sequence[str]) -> None:
    """Checks that no two ranks have the same GPU, which NCCL refuses with a poorer error.

    Args:
        gpus (Sequence[str]): the UUID of each rank's GPU.

    Raises:
        DeviceError: names the ranks and the GPU.

    Example:
        >>> check_own_gpus(["GPU-1 of node a", "GPU-2 of node a"])
        >>> check_own_gpus(["GPU-1 of node a", "GPU-2 of node a", "GPU-1 of node a"])
        Traceback (most recent call last):
        ...
        launch.devices.DeviceError: ranks 0 and 2 have the same GPU, GPU-1 of node a. Allowed: a GPU of its own for each
        rank, since NCCL refuses to share one. Show each rank another GPU (CUDA_VISIBLE_DEVICES), or all ranks of a node
        all of its GPUs; or start fewer ranks
    """
    first: dict[str, int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu in first:
            raise DeviceError(
                f"ranks {first[gpu]} and {rank} have the same GPU, {gpu}. Allowed: a GPU of its own for each rank, "
                "since NCCL refuses to share one. Show each rank another GPU (CUDA_VISIBLE_DEVICES), or all ranks of a "
                "node all of its GPUs; or start fewer ranks"
            )
        first[gpu] = rank


def compare_gpus(store: dist.Store, rank: int, world_size: int, gpu: str) -> None:
    """Sends this rank's GPU to the others, and checks that all are different, before NCCL has started.

    Raises:
        DeviceError: on every rank; see `check_own_gpus`.
    """
    keys = [f"torchrec_qr/gpu/{r}" for r in range(world_size)]
    store.set(keys[rank], gpu)
    check_own_gpus([value.decode() for value in store.multi_get(keys)])


def gpu_name(device: torch.device) -> str:
    """Returns a name that no other GPU of the cluster has."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid} of node {socket.gethostname()}"


def check_started_by_launcher(environment: Mapping[str, str]) -> None:
    """Checks that the ranks of a Slurm step train together.

    Raises:
        DeviceError: ``srun`` started several tasks without a RANK, and each would train by itself.

    Example:
        >>> check_started_by_launcher({"SLURM_STEP_NUM_TASKS": "8", "RANK": "3"})
        >>> check_started_by_launcher({"SLURM_STEP_NUM_TASKS": "8"})
        Traceback (most recent call last):
        ...
        launch.devices.DeviceError: srun started 8 tasks, and RANK is not set: each would train alone. ...
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "RANK" not in environment:
        raise DeviceError(
            f"srun started {tasks} tasks, and RANK is not set: each would train alone. Allowed: torchrun, one task a "
            "node; or RANK=$SLURM_PROCID, WORLD_SIZE=$SLURM_NTASKS, LOCAL_RANK=$SLURM_LOCALID, LOCAL_WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT, set in each task (docs/cluster.md)"
        )


def fill_environment() -> None:
    """Makes this process the only rank, unless a launcher has set the variables."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
