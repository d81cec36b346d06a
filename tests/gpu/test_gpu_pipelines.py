"""TorchRec's pipelines on the device give the outputs of a plain loop, and a step of them does not stall the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from gpu_setups import OF_NCCL, OF_SEVERAL, Setup
from ranks import own_device, run_ranks
from test_pipelines import Batch, batches, compare_pipelines, mixed_model
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_qr import raise_pending
from torchrec_qr.distributed import prepared_ids


@pytest.mark.parametrize("setup", OF_SEVERAL, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_pipelines_give_the_outputs_of_a_plain_loop(setup: Setup, weighted: bool) -> None:
    run_ranks(compare_pipelines, setup.world_size, weighted, backend=setup.backend, device=setup.device, timeout=240)


@contextmanager
def synchronisation(mode: str) -> Iterator[None]:
    """``"error"``: an operation that makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Unsynchronised(TrainPipelineSparseDist[Batch, Any]):
    """In TorchRec's input dist the host waits, for numbers of ids that ranks exchange. In ours, within, it may not."""

    def start_sparse_data_dist(self, *args: Any) -> None:
        prepare = prepared_ids.PrepareIds.__call__

        def prepare_without_waiting(*args: Any) -> Any:
            with synchronisation("error"):
                return prepare(*args)

        with synchronisation("default"), patch.object(prepared_ids.PrepareIds, "__call__", prepare_without_waiting):
            super().start_sparse_data_dist(*args)

    def wait_sparse_data_dist(self, *args: Any) -> None:
        with synchronisation("default"):
            super().wait_sparse_data_dist(*args)


def steps_without_waiting(rank: int, world_size: int) -> int:
    """The number of pipelined steps that made the host wait nowhere else."""
    model, optimizer = mixed_model(False)
    # Pinned, and with the number of ids per feature, which TorchRec would read on the host.
    host = [batch.to(torch.device("cpu")) for batch in batches(rank, world_size, False)]
    data = iter([Batch(b.features.sync().pin_memory(), b.labels.pin_memory()) for b in host])
    pipeline = Unsynchronised(model, optimizer, own_device())
    for _ in range(2):  # compiles kernels, and builds what is kept
        pipeline.progress(data)
    done = 0
    for _ in range(2):
        with synchronisation("error"):
            pipeline.progress(data)
        done += 1
    raise_pending()
    return done


@pytest.mark.only_on_cuda
@pytest.mark.parametrize("setup", OF_NCCL, ids=str)
def test_a_pipelined_step_makes_the_host_wait_for_torchrec_alone(setup: Setup) -> None:
    found = run_ranks(steps_without_waiting, setup.world_size, backend=setup.backend, device=setup.device)
    assert found == [2] * setup.world_size
