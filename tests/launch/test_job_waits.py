"""Time-outs of a job on real gloo ranks: short in a step, long where ranks differ, and short again."""

from datetime import timedelta
from time import monotonic

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed import distributed_c10d

from launch.config import read_job
from launch.sections import TrainSection
from launch.waits import Waits
from tests.launch.jobs import DEMO
from torchrec_qr.cli.schema import ConfigError

CPU = torch.device("cpu")


def timeouts() -> set[timedelta]:
    """Returns those of all groups of this process."""
    groups = [group._get_backend(CPU) for group in distributed_c10d._world.pg_map]
    return {backend.options._timeout for backend in groups}


def raise_and_restore(rank: int, world_size: int) -> None:
    waits = Waits(TrainSection(timeout_minutes=0.5, slow_timeout_minutes=7), CPU)
    with waits.patient():
        assert timeouts() == {timedelta(minutes=7)}
        dist.new_group([0, 1])  # as TorchRec makes its own, with half an hour
    assert len(distributed_c10d._world.pg_map) == 3
    assert timeouts() == {timedelta(seconds=30)}
    with pytest.raises(KeyError), waits.patient():
        raise KeyError
    assert timeouts() == {timedelta(seconds=30)}
    # A long time-out of a step holds in patient sections too.
    assert Waits(TrainSection(timeout_minutes=90), CPU).slow == timedelta(minutes=90)


def test_a_patient_section_raises_the_time_outs_of_all_groups_and_restores_them() -> None:
    run_ranks(raise_and_restore, 2)


def late_in_both(rank: int, world_size: int) -> float:
    second = 1 / 60
    waits = Waits(TrainSection(timeout_minutes=second, slow_timeout_minutes=60 * second), CPU)
    with waits.patient():
        if rank == 1:  # busy for two time-outs of a step
            with pytest.raises(RuntimeError, match="Wait timeout"):
                dist.distributed_c10d._get_default_store().wait(["never"], timedelta(seconds=2))
    distributed_c10d._set_pg_timeout(timedelta(seconds=60))  # of the default group: at the end rank 1 waits for rank 0
    began = monotonic()
    if rank == 0:  # rank 1 does not come
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            waits.meet()
    return monotonic() - began


def test_who_is_late_is_waited_for_in_a_patient_section_and_not_after_it() -> None:
    waited, _ = run_ranks(late_in_both, 2)
    assert 0.9 < waited < 30


@pytest.mark.parametrize("key", ["timeout_minutes", "slow_timeout_minutes"])
def test_time_outs_are_keys_of_the_job(key: str) -> None:
    assert getattr(read_job(DEMO, [f"train.{key}=2.5"]).train, key) == 2.5
    with pytest.raises(ConfigError, match=rf"train\.{key}: 0\.0; allowed: above 0"):
        read_job(DEMO, [f"train.{key}=0.0"])
