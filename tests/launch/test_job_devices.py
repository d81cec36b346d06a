"""A rank takes a GPU of its own, or an error names what it sees. No test here needs a GPU."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from benchmarks.local_ranks import free_port
from launch.devices import DeviceError, check_own_gpus, check_started_by_launcher, compare_gpus, device_index
from launch.process_group import start_process_group
from launch.sections import TrainSection

FIRST_OF_SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("local_rank", "count", "visible", "expected"),
    [
        (0, 1, None, 0),
        (3, 8, None, 3),
        (3, 4, "4,5,6,7", 3),
        (5, 1, "5", 0),  # --gpus-per-task=1
        (2, 1, "MIG-8f3a1b2c", 0),
    ],
)
def test_the_gpu_of_a_rank(local_rank: int, count: int, visible: str | None, expected: int) -> None:
    assert device_index(local_rank, count, visible) == expected


@pytest.mark.parametrize(
    ("local_rank", "count", "visible"), [(1, 1, None), (2, 2, None), (4, 2, "0,1"), (3, 1, "0,7"), (8, 8, None)]
)
def test_fewer_gpus_than_ranks(local_rank: int, count: int, visible: str | None) -> None:
    with pytest.raises(DeviceError) as caught:
        device_index(local_rank, count, visible)
    text = str(caught.value)
    assert f"LOCAL_RANK={local_rank}" in text
    assert f"sees {count} GPU" in text
    assert ("is not set" if visible is None else repr(visible)) in text
    assert f"at most {count} rank" in text
    assert "--gpus-per-task=1" in text


def told(rank: int, world_size: int, gpus: list[str]) -> str:
    store = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    try:
        compare_gpus(store, rank, world_size, gpus[rank])
    except DeviceError as error:
        return str(error)
    return ""


def test_two_ranks_of_one_gpu_are_told_on_every_rank() -> None:
    assert run_ranks(told, 3, ["GPU-1", "GPU-2", "GPU-3"]) == ["", "", ""]
    for text in run_ranks(told, 3, ["GPU-1", "GPU-2", "GPU-2"]):
        assert text.startswith("ranks 1 and 2 have the same GPU, GPU-2. Allowed: ")
        assert "NCCL refuses to share one" in text


def test_gpus_of_one_number_on_two_nodes_are_two() -> None:
    check_own_gpus(["GPU-1 of node a", "GPU-1 of node b"])


def started(rank: int, world_size: int, port: int) -> tuple[Any, ...]:
    import os

    dist.barrier()
    dist.destroy_process_group()
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    device = start_process_group(TrainSection(timeout_minutes=0.75))
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    return device.type, dist.get_rank(), dist.get_world_size(), dist.get_backend(), backend.options._timeout


def test_ranks_meet_by_their_environment_with_the_time_out_of_the_job() -> None:
    expected = [("cpu", rank, 2, "gloo", timedelta(seconds=45)) for rank in range(2)]
    assert run_ranks(started, 2, free_port()) == expected


def test_tasks_of_slurm_that_do_not_know_of_one_another_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"srun started 2 tasks, and RANK is not set.*SLURM_PROCID"):
        check_started_by_launcher(FIRST_OF_SLURM)
    check_started_by_launcher({**FIRST_OF_SLURM, "RANK": "0"})
    check_started_by_launcher({"SLURM_STEP_NUM_TASKS": "1"})
    check_started_by_launcher({"SLURM_NTASKS": "8"})  # in a batch script, before srun
