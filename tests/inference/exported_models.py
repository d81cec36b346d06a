"""Collections with every kind of table that served models have, and batches for them."""

from typing import Any

import torch
from cases import randomize
from kinds import kind_of
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingCollection,
    CompositionalEmbeddingConfig,
)

S = 100
# A batch has them in this order; "x" is nobody's.
KEYS = ("g", "x", "f", "h")


def tables(pooled: bool, **fields: Any) -> list[Any]:
    """Plain and compositional tables of all operations, with features in several, and policies for ids."""
    make = CompositionalEmbeddingBagConfig if pooled else CompositionalEmbeddingConfig
    plain = EmbeddingBagConfig if pooled else EmbeddingConfig
    mean = {"pooling": PoolingType.MEAN} if pooled else {}
    common = {"num_embeddings": S, "embedding_dim": 8}
    return [
        make(name="mult", feature_names=["f", "g"], partitions=kind_of("strided", 2).partitions, **common, **fields),
        plain(name="plain", feature_names=["g"], **common, **mean),
        make(
            name="explicit",
            feature_names=["h"],
            partitions=kind_of("explicit", 2).partitions,
            operation="concat",
            out_of_range="error",
            **common,
            **mean,
        ),
        make(
            name="wrapped",
            feature_names=["h"],
            partitions=kind_of("mixed_radix", 3).partitions,
            operation="add",
            out_of_range="wrap",
            data_type=DataType.FP16,
            **common,
        ),
        make(
            name="clamped",
            feature_names=["f"],
            partitions=kind_of("chinese_remainder", 2).partitions,
            operation="mult",
            out_of_range="clamp",
            data_type=DataType.BF16,
            **common,
        ),
        make(
            name="unchecked",
            feature_names=["g"],
            partitions=kind_of("hash", 1).partitions,
            out_of_range="unchecked",
            **common,
        ),
        make(
            name="hashed",
            feature_names=["f"],
            partitions=kind_of("mixed_radix", 2).partitions,
            id_hash="splitmix64",
            hash_seed=2,
            **common,
        ),
    ]


class Model(nn.Module):
    """A collection whose batch is made of ids (N,), lengths (F, B) and weights of ids, as exported models make it."""

    def __init__(self, collection: Any, keys: tuple[str, ...] = KEYS) -> None:
        super().__init__()
        self.collection = collection
        self.keys = list(keys)

    def forward(self, ids: Tensor, lengths: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        out = self.collection(
            KeyedJaggedTensor(keys=self.keys, values=ids, lengths=lengths.reshape(-1), weights=weights)
        )
        if isinstance(out, dict):
            return [part for found in out.values() for part in parts_of_jagged(found)]
        return [out.values()]


def parts_of_jagged(found: JaggedTensor) -> list[Tensor]:
    weights = found.weights_or_none()
    return [found.values(), found.lengths()] + ([] if weights is None else [weights])


def model(pooled: bool, weighted: bool = False, need_indices: bool = False, given: list[Any] | None = None) -> Model:
    given = tables(pooled) if given is None else given
    collection: Any = (
        CompositionalEmbeddingBagCollection(tables=given, is_weighted=weighted)
        if pooled
        else CompositionalEmbeddingCollection(tables=given, need_indices=need_indices)
    )
    randomize(collection, 0)
    return Model(collection).eval()


def inputs(bags: int, weighted: bool = False, seed: int = 0, most: int = S) -> tuple[Tensor, ...]:
    """Returns ids, lengths and weights for `Model`."""
    generator = torch.Generator().manual_seed(seed + bags)
    lengths = torch.randint(0, 4, (len(KEYS), bags), generator=generator)
    ids = torch.randint(0, most, (int(lengths.sum()),), generator=generator)
    return (ids, lengths, torch.rand(len(ids), generator=generator)) if weighted else (ids, lengths)
