"""The planner's bytes of a backward on a GPU, against what the kernels' host code allocates."""

from typing import Any

import pytest
import torch
from single_tables import bag_table
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchrec_qr import QuotientRemainder
from torchrec_qr.ops.description import Description, TableLayout
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.planner.backward_memory import backward_bytes

pytest.importorskip("triton", reason="Triton is not installed")
from torchrec_qr.ops.triton_kernels import backward_launches, launches
from torchrec_qr.ops.triton_kernels.device_tables import Stored, describe

CPU = torch.device("cpu")


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all memory that is claimed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
        made = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.bytes += sum(t.nbytes for t in made if t.untyped_storage().data_ptr() not in given)
        return out


@pytest.mark.parametrize(
    ("num_ids", "collisions", "ids"), [(4_000_000, 4, 4096), (4_000, 4, 4096), (4_000_000, 2000, 8192)]
)
@pytest.mark.parametrize("dim", [16, 128])
def test_bytes_are_those_that_are_allocated(
    num_ids: int, collisions: int, ids: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (launches, backward_launches):
        monkeypatch.setattr(module, "launch", lambda *args: None)
    config = bag_table(QuotientRemainder(num_collisions=collisions), num_embeddings=num_ids, embedding_dim=dim)
    partitions = config.bound_partitions
    # The addresses are never read, so that a table of any size is described in no memory.
    layouts = partition_layouts(partitions, {0: dim, 1: dim})
    stored = [Stored(4096 * (j + 1), size, dim, dim, torch.float32) for j, size in enumerate(partitions.sizes)]
    d = describe(Description([TableLayout("mult", layouts, num_ids=num_ids)], ["t"]), stored, [], CPU)
    batch = launches.batch_of(d, torch.zeros(ids, dtype=torch.int64), torch.arange(ids + 1), None, True)
    weights = [torch.empty(0, dim)] * 2
    stepping = backward_launches.stepping_of(weights, [backward_launches.GRADIENT] * 2, [[], []], d)
    step = backward_launches.Step([None] * 2, [None] * 2, [0.0] * 14)
    gradient = torch.zeros(ids, dim)
    backward_launches.step_looked_up_rows(d, batch, gradient, stepping, step)  # keeps descriptors
    with _Allocations() as claimed:
        backward_launches.step_looked_up_rows(d, batch, gradient, stepping, step)
    counted = backward_bytes(config, ids, 0, dim)
    # A table begins with a block of ranges of its own, which is not counted.
    assert claimed.bytes <= counted + 2 * 32 * 4 * dim + 64
    # The memory that sorting takes for itself is counted, and is seen on a GPU alone.
    assert counted - claimed.bytes <= 32 * ids
