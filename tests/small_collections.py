"""A collection of two small tables, and what to compare of it."""

from typing import Any

import pytest
import torch
from batches import Bags, batch
from cases import kind_of, randomize
from single_tables import collection_of, plain_table, table_of
from torch import Tensor, nn
from torchrec import KeyedTensor

from torchrec_qr.partitions import PartitionSpec

S = 100
OPERATIONS: dict[str, dict[str, Any]] = {
    "mult": {"operation": "mult"},
    "add": {"operation": "add"},
    "concat": {"operation": "concat"},
    "path": {"operation": "path"},
    "path_hidden": {"operation": "path", "path_hidden": 3, "path_activation": "tanh"},
}
KINDS = ("strided", "explicit")
each_operation = pytest.mark.parametrize("operation", OPERATIONS)
each_kind = pytest.mark.parametrize("kind", KINDS)
pooled_or_not = pytest.mark.parametrize("pooled", [True, False])
BATCH = {"f": [[0, 5, 99], [], [7]], "g": [[1], [2, 2], [9]]}
OTHER_BATCH = {"f": [[13], [98, 13, 13, 4], [50], [51, 1], []], "g": [[], [3], [0, 1, 2, 3], [8], [8]]}


def partitions_of(kind: str) -> PartitionSpec:
    return kind_of(kind, 2).partitions


def collection(
    partitions: PartitionSpec, pooled: bool = True, device: torch.device | None = None, seed: int = 0, **fields: Any
) -> Any:
    """A compositional table ``t`` of feature f and a plain table ``p`` of feature g."""
    tables = [
        table_of(partitions, pooled, **{"num_embeddings": S, **fields}),
        plain_table(pooled, name="p", feature_names=["g"], num_embeddings=10, embedding_dim=4),
    ]
    module = collection_of(tables, device)
    if device is None:
        randomize(module, seed)
    return module


def outputs(module: Any, per_feature: dict[str, Bags]) -> list[Tensor]:
    out = module(batch(per_feature))
    return [out["f"], out["g"]] if isinstance(out, KeyedTensor) else [out["f"].values(), out["g"].values()]


def gradients(module: nn.Module, results: list[Tensor]) -> list[Tensor]:
    """Gradients of Σ c · output for all parameters, with c = 1, 2, 3, … so that a permutation shows."""
    total = torch.stack([(out * torch.arange(1, out.numel() + 1).view(out.shape)).sum() for out in results]).sum()
    return list(torch.autograd.grad(total, list(module.parameters())))


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
