"""The reference's order of work: each partition is pooled, then the pooled rows are multiplied. For comparison only."""

from typing import cast

import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from benchmarks.quality.feature_generation import FeatureGenerationEmbeddingBagCollection
from torchrec_qr import CompositionalEmbeddingBagConfig
from torchrec_qr.configs import InitFn
from torchrec_qr.init import partition_configs


class PoolFirstEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """out[b, f] = ∏_j Σ_{ids x of bag (b, f)} W_j[p_j(x)]: what `mult` is not, on bags of several ids.

    Partitions start as those of `mult` do.
    """

    def __init__(self, tables: list[EmbeddingBagConfig], device: torch.device | None = None) -> None:
        super().__init__()
        for table in tables:
            if isinstance(table, CompositionalEmbeddingBagConfig) and table.given_init_fn is None:
                table.init_fn = cast(list[InitFn], [part.init_fn for part in partition_configs(table)])
        self._tables, self._dim = tables, tables[0].embedding_dim
        self._partition_names = {
            feature: [f"{feature}.partition_{j}" for j in range(table.num_partitions)]
            if isinstance(table, CompositionalEmbeddingBagConfig)
            else [feature]
            for table in tables
            for feature in table.feature_names
        }
        self.partitions = FeatureGenerationEmbeddingBagCollection(tables=tables, device=device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return _multiplied(self.partitions(features), self._partition_names, self._dim)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._tables

    def is_weighted(self) -> bool:
        return False


@torch.fx.wrap  # TorchRec's pipelines trace the model, and a trace cannot look into a KeyedTensor
def _multiplied(pooled: KeyedTensor, names: dict[str, list[str]], dim: int) -> KeyedTensor:
    values = [torch.stack([pooled[part] for part in parts]).prod(dim=0) for parts in names.values()]
    return KeyedTensor(list(names), [dim] * len(names), torch.cat(values, dim=1))
