"""The sharded collection without pooling, and its sharder."""

from collections.abc import Mapping
from typing import Any

import torch
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.distributed.node_env import node_env_of
from torchrec_qr.distributed.per_node_plan import is_per_node, within_node
from torchrec_qr.distributed.sharded_collection import ShardedCompositionalCollection, checked_features
from torchrec_qr.distributed.sharder import CompositionalSharder
from torchrec_qr.distributed.sharding import SEQUENCE_SHARDINGS
from torchrec_qr.distributed.unique_ids import unique_ids
from torchrec_qr.modules.embedding_collection import CompositionalEmbeddingCollection


class ShardedCompositionalEmbeddingCollection(ShardedCompositionalCollection, ShardedEmbeddingCollection):
    """`CompositionalEmbeddingCollection`, sharded by a plan with one ``ParameterSharding`` per logical table.

    It is a ``ShardedEmbeddingCollection`` of TorchRec. Ranks look up and compose the rows that they own, and send D
    floats per id, whatever K. The ``state_dict`` has the keys of the unsharded module under every plan.
    """

    _tables_attribute = "embeddings"

    # Keep the values of a module on a CPU, because TorchRec's collection does, unlike its pooled one.
    _drawn_anew = ("meta",)

    def _prepare(self, plan: Mapping[str, ParameterSharding]) -> None:
        _check_column_widths(plan)

    @classmethod
    def create_embedding_sharding(
        cls,
        sharding_type: str,
        sharding_infos: list[Any],
        env: ShardingEnv,
        device: torch.device | None = None,
        qcomm_codecs_registry: Any = None,
    ) -> Any:
        env = node_env_of(env) if is_per_node(sharding_type) else env
        sharding_type = within_node(sharding_type)
        if sharding_type not in SEQUENCE_SHARDINGS:
            names = [info.embedding_config.name for info in sharding_infos]
            raise ValueError(
                f"tables {names}: sharding type {sharding_type!r} is not supported for sequences; "
                f"allowed: {', '.join(SEQUENCE_SHARDINGS)}"
            )
        kwargs: dict[str, Any] = {}
        if sharding_type != ShardingType.DATA_PARALLEL.value:
            kwargs["qcomm_codecs_registry"] = qcomm_codecs_registry
        return SEQUENCE_SHARDINGS[sharding_type](sharding_infos, env, device, **kwargs)

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        return super().input_dist(ctx, self.prepared(features))

    def prepared(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns a batch for an input dist.

        Raises:
            NotImplementedError: the features differ in their number of bags.
        """
        features = checked_features(self, features)
        if features.variable_stride_per_key():
            raise NotImplementedError(
                "variable batch per feature is not supported by sharded compositional collections of sequences; "
                f"features {features.keys()}; allowed: one number of bags for all"
            )
        return features

    def _dedup_indices(self, ctx: Any, input_feature_splits: list[KeyedJaggedTensor]) -> list[KeyedJaggedTensor]:
        """Puts each id of a feature once into the feature's first bag, because TorchRec can on CUDA alone.

        Ids come into range first, because an id past the end of a table would count as one of the next.
        """
        shardings: list[Any] = list(self._sharding_type_to_sharding.values())
        bounded = [of.bounded(features) for of, features in zip(shardings, input_feature_splits, strict=True)]
        # Join the features of all sharding types, because a GPU then waits once for how many ids are left.
        unique, numbers = unique_ids(KeyedJaggedTensor.concat(bounded))
        parts: list[KeyedJaggedTensor] = unique.split([len(features.keys()) for features in bounded])
        first = 0
        for of, part in zip(numbers.split([len(features.values()) for features in bounded]), parts, strict=True):
            ctx.reverse_indices.append(of - first)
            first += len(part.values())
        ctx.input_features.extend(bounded)
        return parts


class CompositionalEmbeddingCollectionSharder(CompositionalSharder[CompositionalEmbeddingCollection]):
    """Shards `CompositionalEmbeddingCollection`, like TorchRec's ``EmbeddingCollectionSharder``.

    Args:
        fused_params (dict[str, Any] | None): see `CompositionalEmbeddingBagCollectionSharder`.
        qcomm_codecs_registry (dict[str, Any] | None): TorchRec's codecs of embeddings that ranks send.
        use_index_dedup (bool): whether to look up each id of a batch once, and to send its embedding once. The host
            then waits in the input dist on a GPU, for how many ids are left.

    Example:
        >>> from torchrec_qr.distributed import CompositionalEmbeddingCollectionSharder
        >>> CompositionalEmbeddingCollectionSharder().sharding_types("cpu")
        ['table_wise', 'column_wise', 'row_wise', 'data_parallel']
    """

    _unsharded = CompositionalEmbeddingCollection
    _sharded = ShardedCompositionalEmbeddingCollection
    _shardings = SEQUENCE_SHARDINGS

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, Any] | None = None,
        use_index_dedup: bool = False,
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry)
        self._use_index_dedup = use_index_dedup

    def _options(self) -> dict[str, Any]:
        return {"use_index_dedup": self._use_index_dedup}


def _check_column_widths(plan: Mapping[str, ParameterSharding]) -> None:
    """Refuses column shards of different widths, because TorchRec reads past the end of the narrower ones.

    Raises:
        ValueError: column shards have different widths.
    """
    widths = {
        name: [shard.shard_sizes[1] for shard in sharding.sharding_spec.shards]  # type: ignore[union-attr]
        for name, sharding in plan.items()
        if sharding.sharding_type == ShardingType.COLUMN_WISE.value
    }
    if len({width for of_table in widths.values() for width in of_table}) > 1:
        raise ValueError(
            f"column_wise tables of sequences: shards of {widths} columns; allowed: one width for all column shards "
            "of a collection (min_partition of ParameterConstraints)"
        )
