"""Sharded compositional collections for ``DistributedModelParallel``."""

from typing import Any

from torchrec.distributed.sharding_plan import get_default_sharders as _torchrec_sharders
from torchrec.distributed.types import ModuleSharder

from torchrec_qr.distributed.embedding import CompositionalEmbeddingCollectionSharder
from torchrec_qr.distributed.embeddingbag import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.distributed.hooks import HOOKS, require
from torchrec_qr.distributed.inner_collections import with_compositional_inside
from torchrec_qr.distributed.per_node_plan import per_node
from torchrec_qr.distributed.stepped_by import optimizer_of_each_parameter

__all__ = [
    "CompositionalEmbeddingBagCollectionSharder",
    "CompositionalEmbeddingCollectionSharder",
    "get_default_sharders",
    "optimizer_of_each_parameter",
    "per_node",
]

require(HOOKS)


def get_default_sharders() -> list[ModuleSharder[Any]]:
    """Returns TorchRec's default sharders and ours, for ``DistributedModelParallel(model, sharders=…)``.

    They also shard a ``FeatureProcessedEmbeddingBagCollection`` of a compositional collection, and managed collisions
    in front of one.

    Example:
        >>> from torchrec_qr.distributed import get_default_sharders
        >>> {"CompositionalEmbeddingBagCollectionSharder", "EmbeddingBagCollectionSharder"} <= {
        ...     type(sharder).__name__ for sharder in get_default_sharders()}
        True
    """
    return [
        *with_compositional_inside(_torchrec_sharders()),
        CompositionalEmbeddingBagCollectionSharder(),
        CompositionalEmbeddingCollectionSharder(),
    ]
