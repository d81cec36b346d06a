"""Compositional tables of one feature, whose fields have defaults. Tests state the fields that matter to them."""

from typing import Any

from torchrec_qr import CompositionalEmbeddingBagConfig, CompositionalEmbeddingConfig
from torchrec_qr.partitions import PartitionSpec

_DEFAULTS = {"name": "t", "feature_names": ["f"], "num_embeddings": 100, "embedding_dim": 8}


def bag_table(partitions: PartitionSpec, **fields: Any) -> CompositionalEmbeddingBagConfig:
    return CompositionalEmbeddingBagConfig(**_DEFAULTS | fields, partitions=partitions)


def sequence_table(partitions: PartitionSpec, **fields: Any) -> CompositionalEmbeddingConfig:
    return CompositionalEmbeddingConfig(**_DEFAULTS | fields, partitions=partitions)
