"""The paper's feature generation baseline: each partition's embedding is a feature of its own."""

from dataclasses import replace
from typing import cast

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig
from torchrec_qr.configs import InitFn
from torchrec_qr.init import partition_configs


class FeatureGenerationEmbeddingBagCollection(CompositionalEmbeddingBagCollection):
    """Pooled embeddings in which every partition is a feature of its own (arXiv:1909.02107, section 5's baseline).

    For feature f of a compositional table, bag b and partition j, the output ``KeyedTensor`` holds

        out[b, f.partition_j] = pool over ids x of bag (b, f) of  w_x · W_j[p_j(x)]

    with nothing composed; plain tables are as in `CompositionalEmbeddingBagCollection`. Every partition has all D
    columns, and starts as a plain table of its |P_j| rows would. Outputs are called ``<feature>.partition_<j>``, and
    `embedding_bag_configs` gives one config per partition with those feature names, so that TorchRec's models, which
    read them there, take K features in the place of one.

    Shapes: input ``KeyedJaggedTensor`` of F features × B bags; output (B, ΣK·D) fp32.

    Args:
        tables, is_weighted, device: as `CompositionalEmbeddingBagCollection`; ``operation`` stays at its default.

    Raises:
        ValueError: a table with another ``operation``; and all that `CompositionalEmbeddingBagCollection` raises.

    Example:
        >>> import torch
        >>> from torchrec import KeyedJaggedTensor
        >>> from torchrec_qr import CompositionalEmbeddingBagConfig, QuotientRemainder
        >>> ebc = FeatureGenerationEmbeddingBagCollection(tables=[
        ...     CompositionalEmbeddingBagConfig(name="t_user", feature_names=["user"], num_embeddings=1000,
        ...         embedding_dim=8, partitions=QuotientRemainder(num_collisions=10))])
        >>> out = ebc(KeyedJaggedTensor(keys=["user"], values=torch.tensor([7, 999]), lengths=torch.tensor([1, 1])))
        >>> out.keys(), tuple(out.values().shape)
        (['user.partition_0', 'user.partition_1'], (2, 16))
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> None:
        # K embeddings side by side are a concatenation of K full widths: the same lookup under other names.
        as_one = [_concatenated(t) if isinstance(t, CompositionalEmbeddingBagConfig) else t for t in tables]
        super().__init__(as_one, is_weighted, device)
        self._logical_tables = tables
        names, self._embedding_names, self._lengths_per_embedding = self._embedding_names, [], []
        for name, config in zip(names, (t for t in tables for _ in t.feature_names), strict=True):
            parts = _names(name, config)
            self._embedding_names += parts
            self._lengths_per_embedding += [config.embedding_dim] * len(parts)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Returns a config per partition, named and with features named ``<…>.partition_<j>``; plain ones as given."""
        return [part for config in self._logical_tables for part in _per_partition(config)]


def _names(name: str, config: EmbeddingBagConfig) -> list[str]:
    if not isinstance(config, CompositionalEmbeddingBagConfig):
        return [name]
    return [f"{name}.partition_{j}" for j in range(config.num_partitions)]


def _concatenated(config: CompositionalEmbeddingBagConfig) -> CompositionalEmbeddingBagConfig:
    if config.operation != "mult":
        raise ValueError(
            f"table {config.name!r}: operation={config.operation!r}; allowed: the default, 'mult', "
            "since feature generation composes nothing"
        )
    k, dim = config.num_partitions, config.embedding_dim
    as_plain = [
        EmbeddingBagConfig(num_embeddings=rows, embedding_dim=dim).init_fn for rows in config.bound_partitions.sizes
    ]
    return replace(
        config,
        operation="concat",
        embedding_dim=k * dim,
        partition_dims=(dim,) * k,
        init_fn=config.given_init_fn or cast(list[InitFn], as_plain),
    )


def _per_partition(config: EmbeddingBagConfig) -> list[EmbeddingBagConfig]:
    if not isinstance(config, CompositionalEmbeddingBagConfig):
        return [config]
    features = zip(*(_names(feature, config) for feature in config.feature_names), strict=True)
    parts = cast(list[EmbeddingBagConfig], partition_configs(_concatenated(config)))
    return [replace(part, feature_names=list(names)) for part, names in zip(parts, features, strict=True)]
