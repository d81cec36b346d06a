"""Tables of one feature, whose fields have defaults, and collections. Tests state the fields that matter to them."""

from collections.abc import Sequence
from typing import Any

import torch
from torchrec import EmbeddingBagConfig, EmbeddingConfig

from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingCollection,
    CompositionalEmbeddingConfig,
)
from torchrec_qr.partitions import PartitionSpec


def bag_table(partitions: PartitionSpec, **fields: Any) -> CompositionalEmbeddingBagConfig:
    """Table t of feature f, and a table of another name of the feature f_name."""
    return CompositionalEmbeddingBagConfig(**_fields(fields), partitions=partitions)


def sequence_table(partitions: PartitionSpec, **fields: Any) -> CompositionalEmbeddingConfig:
    return CompositionalEmbeddingConfig(**_fields(fields), partitions=partitions)


def plain_table(pooled: bool = True, **fields: Any) -> Any:
    return (EmbeddingBagConfig if pooled else EmbeddingConfig)(**_fields(fields))


def table_of(partitions: PartitionSpec | None, pooled: bool, **fields: Any) -> Any:
    """A compositional table, or a plain one without partitions."""
    if partitions is None:
        return plain_table(pooled, **fields)
    return (bag_table if pooled else sequence_table)(partitions, **fields)


def _fields(fields: dict[str, Any]) -> dict[str, Any]:
    feature = f"f_{fields['name']}" if "name" in fields else "f"
    return {"name": "t", "feature_names": [feature], "num_embeddings": 100, "embedding_dim": 8} | fields


def collection_of(tables: Sequence[Any], device: str | torch.device | None = None, is_weighted: bool = False) -> Any:
    """A collection of bags, or of sequences if the tables are."""
    at = None if device is None else torch.device(device)
    if isinstance(tables[0], EmbeddingBagConfig):
        return CompositionalEmbeddingBagCollection(tables=list(tables), is_weighted=is_weighted, device=at)
    return CompositionalEmbeddingCollection(tables=list(tables), device=at)
