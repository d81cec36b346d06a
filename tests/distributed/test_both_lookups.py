"""Sharded lookups by the kernels and by PyTorch: the first are used where they can be, the second trains the same."""

from typing import Any

import pytest
from parity_model import OPTIMIZERS, Run, Trained, one_of_each, train
from parity_reference import assert_trained_as_reference
from placements import BASIC_SHARDINGS
from ranks import run_ranks

from torchrec_qr.ops.backends import cpu
from torchrec_qr.ops.cpu_library import without_kernels
from torchrec_qr.ops.description import Description


def train_in_pytorch(rank: int, world_size: int, run: Run) -> Trained:
    with without_kernels():
        return train(rank, world_size, run)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pytorch_trains_as_reference(optimizer: str) -> None:
    run = Run(one_of_each(), optimizer=optimizer, weighted=True)
    assert_trained_as_reference(run, run_ranks(train_in_pytorch, 2, run))


@pytest.mark.parametrize("optimizer", ["adagrad", "amsgrad"])
def test_pytorch_trains_sequences_as_reference(optimizer: str) -> None:
    run = Run(one_of_each(BASIC_SHARDINGS, operation="add"), optimizer=optimizer, pooled=False)
    assert_trained_as_reference(run, run_ranks(train_in_pytorch, 2, run))


def tables_of_kernels(rank: int, world_size: int, run: Run) -> set[str]:
    """The tables whose rows the kernels stepped, or gave gradients of, on this rank."""
    seen: set[str] = set()
    backward = cpu.backward

    def recorded(tables: Description, *args: Any) -> Any:
        seen.update(tables.names)
        return backward(tables, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "backward", recorded)
        train(rank, world_size, run)
    return seen


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")
@pytest.mark.parametrize("pooled", [True, False])
def test_every_lookup_is_the_kernels(pooled: bool) -> None:
    shardings = {} if pooled else {"shardings": BASIC_SHARDINGS}
    run = Run(one_of_each(**shardings), pooled=pooled)  # type: ignore[arg-type]
    seen = set().union(*run_ranks(tables_of_kernels, 2, run))
    assert seen == {table.name for table in run.tables}
