"""The small models that pages take as given: a table of users, one of countries, and a DLRM of both."""

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DLRM

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder


def compositional(feature: str, num_embeddings: int) -> CompositionalEmbeddingBagConfig:
    """Returns the config of a feature's table, of which four ids share a row."""
    return CompositionalEmbeddingBagConfig(
        name=f"t_{feature}",
        feature_names=[feature],
        num_embeddings=num_embeddings,
        embedding_dim=16,
        partitions=QuotientRemainder(num_collisions=4),
    )


def full(feature: str, num_embeddings: int, embedding_dim: int = 16) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=f"t_{feature}", feature_names=[feature], num_embeddings=num_embeddings, embedding_dim=embedding_dim
    )


def compressed_dlrm(users: int, device: str = "cpu") -> DLRM:
    tables = [compositional("user", users), full("country", 250)]
    return _dlrm(CompositionalEmbeddingBagCollection(tables=tables, device=torch.device(device)))


def full_dlrm(users: int) -> DLRM:
    return _dlrm(EmbeddingBagCollection(tables=[full("user", users), full("country", 250)]))


def _dlrm(collection: EmbeddingBagCollection) -> DLRM:
    return DLRM(collection, dense_in_features=4, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1])
