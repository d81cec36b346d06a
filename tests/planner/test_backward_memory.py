"""The planner's bytes of a backward on a GPU, against what the kernels' host code allocates."""

from typing import Any

import pytest
import torch

from torchrec_qr import CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.ops.description import Description, TableLayout
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.planner.backward_memory import backward_bytes

pytest.importorskip("triton", reason="Triton is not installed")
from torchrec_qr.ops.triton_kernels import launches
from torchrec_qr.ops.triton_kernels.device_tables import Stored, describe

CPU = torch.device("cpu")


class _NoLaunch:
    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(
    ("num_ids", "collisions", "ids"), [(4_000_000, 4, 4096), (4_000, 4, 4096), (4_000_000, 2000, 8192)]
)
@pytest.mark.parametrize("dim", [16, 128])
def test_bytes_are_those_that_are_allocated(
    num_ids: int, collisions: int, ids: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in ("keys_of_ids", "chunks_of_keys", "sum_chunks", "sum_supers", "sum_runs"):
        monkeypatch.setattr(launches, kernel, _NoLaunch())
    config = CompositionalEmbeddingBagConfig(
        name="t",
        feature_names=["f"],
        num_embeddings=num_ids,
        embedding_dim=dim,
        partitions=QuotientRemainder(num_collisions=collisions),
    )
    partitions = config.bound_partitions
    # The addresses are never read, so that a table of any size is described in no memory.
    layouts = partition_layouts(partitions, {0: dim, 1: dim})
    stored = [Stored(4096 * (j + 1), size, dim, dim, torch.float32) for j, size in enumerate(partitions.sizes)]
    d = describe(Description([TableLayout("mult", layouts, num_ids=num_ids)], ["t"]), stored, [], CPU)
    batch = launches.batch_of(d, torch.zeros(ids, dtype=torch.int64), torch.arange(ids + 1), None, True)
    sums = [launches.sum_rows(d, batch, torch.zeros(ids, dim), number, [True, True]) for number in range(2)]
    kept = sum(t.nbytes for s in sums for t in s)
    counted = backward_bytes(config, ids, 0, dim)
    # Sorting takes what is counted beside the rows, and only while it lasts.
    assert kept <= counted
    if max(partitions.sizes) >= ids:
        assert counted - kept <= 60 * ids + 16 * kept // (4 * dim)
