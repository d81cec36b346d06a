"""TorchRec's pipelines on the device give the outputs of a plain loop, and a step of them does not stall the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_setups import DEVICE, OF_SEVERAL, SETUPS, Setup
from ranks import own_device, run_ranks
from test_pipelines import Batch, batches, compare_pipelines, mixed_model
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_qr import raise_pending


@pytest.mark.parametrize("setup", OF_SEVERAL, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_pipelines_give_the_outputs_of_a_plain_loop(setup: Setup, weighted: bool) -> None:
    run_ranks(compare_pipelines, setup.world_size, weighted, backend=setup.backend, device=DEVICE, timeout=240)


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
    """TorchRec reads on the host how many ids come from each rank, there alone."""

    def wait_sparse_data_dist(self, context: Any) -> None:
        with synchronisation("default"):
            super().wait_sparse_data_dist(context)


def steps_without_waiting(rank: int, world_size: int) -> int:
    """The number of pipelined steps that made the host wait nowhere else."""
    model, optimizer = mixed_model(False)
    device = own_device()
    # Pinned, and with the number of ids per feature, which TorchRec would read on the host.
    host = [batch.to(torch.device("cpu")) for batch in batches(rank, world_size, False)]
    data = [Batch(b.features.sync().pin_memory(), b.labels.pin_memory()) for b in host]
    pipeline = Unsynchronised(model, optimizer, device)
    it = iter(data)
    for _ in range(2):  # compiles kernels, and builds what is kept
        pipeline.progress(it)
    done = 0
    for _ in range(2):
        with synchronisation("error"):
            pipeline.progress(it)
        done += 1
    raise_pending()
    return done


@pytest.mark.only_on_cuda
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_pipelined_step_makes_the_host_wait_for_torchrec_alone(setup: Setup) -> None:
    if setup.backend == "gloo":
        pytest.skip("gloo copies CUDA tensors to the host")
    found = run_ranks(steps_without_waiting, setup.world_size, backend=setup.backend, device=DEVICE)
    assert found == [2] * setup.world_size
