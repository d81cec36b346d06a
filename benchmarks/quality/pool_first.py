"""The reference's order of work: each partition is pooled, then the pooled rows are multiplied. For comparison only."""

import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from torchrec_qr import CompositionalEmbeddingBagConfig, FeatureGenerationEmbeddingBagCollection
from torchrec_qr.init import partition_configs


class PoolFirstEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """out[b, f] = ∏_j Σ_{ids x of bag (b, f)} W_j[p_j(x)]: what `mult` is not, on bags of several ids.

    Partitions start as those of `mult` do.
    """

    def __init__(self, tables: list[EmbeddingBagConfig], device: torch.device | None = None) -> None:
        super().__init__()
        for table in tables:
            if isinstance(table, CompositionalEmbeddingBagConfig) and table.init_fn is None:
                table.init_fn = [part.init_fn for part in partition_configs(table)]
        self._tables = tables
        self.partitions = FeatureGenerationEmbeddingBagCollection(tables=tables, device=device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        pooled = self.partitions(features).to_dict()
        names, values = [], []
        for table in self._tables:
            for feature in table.feature_names:
                parts = [v for key, v in pooled.items() if key == feature or key.startswith(f"{feature}.partition_")]
                names.append(feature)
                values.append(torch.stack(parts).prod(dim=0))
        return KeyedTensor(
            names, [t.embedding_dim for t in self._tables for _ in t.feature_names], torch.cat(values, 1)
        )

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._tables

    def is_weighted(self) -> bool:
        return False
