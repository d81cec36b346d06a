"""Collections and models of all kinds of tables, and the error that the scales of quantised rows allow."""

from typing import Any

import torch
from batches import batch
from cases import randomize
from kinds import kind_of
from single_tables import collection_of, table_of
from small_collections import OPERATIONS
from torch import Tensor, nn
from torch.ao.quantization import PlaceholderObserver
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, PoolingType, QuantConfig
from torchrec.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

S = 100
# The operators have these; PyTorch looks up `PYTORCH_TABLES`.
SERVED = {
    "plain": (None, {}),
    "strided_mult": (kind_of("strided", 2).partitions, OPERATIONS["mult"]),
    "adjacent_add": (kind_of("adjacent", 2).partitions, OPERATIONS["add"]),
    "radix_concat": (kind_of("mixed_radix", 3).partitions, OPERATIONS["concat"]),
    "chinese_mult": (kind_of("chinese_remainder", 4).partitions, OPERATIONS["mult"]),
    "hash": (kind_of("hash", 1).partitions, OPERATIONS["add"]),
    "explicit_mult": (kind_of("explicit", 2).partitions, OPERATIONS["mult"]),
    "hashed_mult": (kind_of("strided", 2).partitions, {**OPERATIONS["mult"], "id_hash": "splitmix64", "hash_seed": 3}),
}


PLAIN = {"plain": SERVED["plain"]}


def tables(pooled: bool, kinds: dict[str, Any] = SERVED, dim: int = 16) -> list[Any]:
    """One table of each kind; every other one is MEAN, and the second has two features, one of them shared."""
    out = []
    for i, (name, (partitions, fields)) in enumerate(kinds.items()):
        own: dict[str, Any] = {"name": name, "num_embeddings": S, "embedding_dim": dim, **fields}
        if pooled and i % 2:
            own["pooling"] = PoolingType.MEAN
        if i == 1:
            own["feature_names"] = [f"f_{name}", "f_plain"]
        out.append(table_of(partitions, pooled, **own))
    return out


def float_collection(pooled: bool, is_weighted: bool = False, **how: Any) -> Any:
    module = collection_of(tables(pooled, **how), is_weighted=is_weighted)
    randomize(module, seed=0)
    return module


def qconfig(dtype: torch.dtype, output: torch.dtype = torch.float32, of_table: Any = None) -> QuantConfig:
    return QuantConfig(
        activation=PlaceholderObserver.with_args(dtype=output),
        weight=PlaceholderObserver.with_args(dtype=dtype),
        per_table_weight_dtype=of_table,
    )


def features_of(module: Any, seed: int = 0, bags: int = 6) -> KeyedJaggedTensor:
    """A batch with the features of a collection in the reverse order, weights, and a feature of nobody."""
    generator = torch.Generator().manual_seed(seed)
    configs = module.embedding_bag_configs() if hasattr(module, "embedding_bag_configs") else module.embedding_configs()
    names = list(dict.fromkeys(name for config in configs for name in config.feature_names))
    ids = {
        name: [
            torch.randint(0, S, (int(length),), generator=generator).tolist()
            for length in torch.randint(0, 4, (bags,), generator=generator)
        ]
        for name in ["nobody", *reversed(names)]
    }
    count = sum(len(bag) for of in ids.values() for bag in of)
    return batch(ids, torch.rand(count, generator=generator) * 2 - 1)


def values_of(out: Any) -> Tensor:
    """All values of an output in one vector."""
    if isinstance(out, dict):
        return torch.cat([jagged.values().flatten() for jagged in out.values()])
    return out.values().flatten()


def row_errors(weight: Tensor, stored: Tensor) -> Tensor:
    """(rows, 1) float64: the most that a value of a stored row may differ from its float.

    Half a step of the row's scale, and what fp16 (11 bits) rounds of the bias, its least value, and of the scale.
    """
    scale = stored[:, -4:].contiguous().view(torch.float16)[:, :1].double()
    low, high = weight.double().amin(1, keepdim=True), weight.double().amax(1, keepdim=True)
    return scale / 2 + 2.0**-11 * (low.abs() + high - low)


def embedding_errors(config: Any, rows: list[Tensor], weights: list[Tensor], stored: list[Tensor]) -> Tensor:
    """(N, D) float64: the most that embeddings of rows (N,) of each partition may differ.

    mult: Π(|a_j| + e_j) - Π|a_j|; add: Σ e_j; concat and plain: e_j of its columns.
    """
    values = [w.double()[r].abs() for w, r in zip(weights, rows, strict=True)]
    errors = [row_errors(w, s)[r].expand_as(v) for w, s, r, v in zip(weights, stored, rows, values, strict=True)]
    operation = getattr(config, "operation", "concat")
    if operation == "concat":
        return torch.cat(errors, dim=1)
    if operation == "add":
        return torch.stack(errors).sum(0)
    return (torch.stack(values) + torch.stack(errors)).prod(0) - torch.stack(values).prod(0)


DTYPES = {torch.qint8: DataType.INT8, torch.quint4x2: DataType.INT4}


class MixedModel(nn.Module):
    """A collection of each of four kinds, below a module of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = nn.ModuleDict({"pooled": float_collection(True), "sequences": float_collection(False)})
        self.theirs_pooled = EmbeddingBagCollection(tables=tables(True, kinds=PLAIN))
        self.theirs_sequences = EmbeddingCollection(tables=tables(False, kinds=PLAIN))
        self.dropout = nn.Dropout()
        randomize(self, seed=0)

    def collections(self) -> list[nn.Module]:
        return [*self.ours.values(), self.theirs_pooled, self.theirs_sequences]

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.dropout(torch.cat([values_of(collection(features)) for collection in self.collections()]))


def processed(inner: Any, as_dict: bool) -> FeatureProcessedEmbeddingBagCollection:
    names = [name for config in inner.embedding_bag_configs() for name in config.feature_names]
    weights = PositionWeightedModuleCollection(max_feature_lengths=dict.fromkeys(names, 5))
    for position, weight in enumerate(weights.position_weights.values()):
        weight.data.copy_(torch.arange(1.0, 6) + position)
    if not as_dict:
        return FeatureProcessedEmbeddingBagCollection(inner, weights)
    modules = {name: PositionWeightedModule(max_feature_length=5) for name in names}
    for name, module in modules.items():
        module.position_weight.data.copy_(weights.position_weights[name])
    return FeatureProcessedEmbeddingBagCollection(inner, modules)
