"""The sharded collection without pooling, and its sharder."""

from collections.abc import Mapping
from typing import Any

import torch
from torchrec.distributed.embedding import EmbeddingCollectionContext, ShardedEmbeddingCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_qr.distributed.node_env import node_env_of
from torchrec_qr.distributed.per_node_plan import is_per_node, within_node
from torchrec_qr.distributed.sharded_collection import ShardedCompositionalCollection, checked_features
from torchrec_qr.distributed.sharder import CompositionalSharder
from torchrec_qr.distributed.sharding import SEQUENCE_SHARDINGS
from torchrec_qr.distributed.unique_ids import unique_ids
from torchrec_qr.modules.embedding_collection import CompositionalEmbeddingCollection


class SequenceContext(EmbeddingCollectionContext):
    """Adds whether the batch of this rank has bags. It is no dataclass, because that of TorchRec 1.6 is none."""

    # False if the batch got an empty bag for each feature, because TorchRec cannot divide by none.
    has_bags = True


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

    def create_context(self) -> SequenceContext:
        return SequenceContext()

    def input_dist(self, ctx: SequenceContext, features: KeyedJaggedTensor) -> Any:  # type: ignore[override]
        return super().input_dist(ctx, self.prepared(ctx, features))

    def output_dist(self, ctx: SequenceContext, output: Any) -> Any:  # type: ignore[override]
        return _completed(ctx, super().output_dist(ctx, output))

    def compute_and_output_dist(self, ctx: SequenceContext, input: Any) -> Any:  # type: ignore[override]
        return _completed(ctx, super().compute_and_output_dist(ctx, input))

    def prepared(self, ctx: SequenceContext, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns a batch for an input dist, and keeps in ``ctx`` what the output needs.

        Raises:
            NotImplementedError: the features differ in their number of bags.
        """
        features = checked_features(self, features)
        if features.variable_stride_per_key():
            raise NotImplementedError(
                "variable batch per feature is not supported by sharded compositional collections of sequences; "
                f"features {features.keys()}; allowed: one number of bags for all"
            )
        ctx.has_bags = features.stride() > 0
        if ctx.has_bags:
            return features
        keys = features.keys()
        return KeyedJaggedTensor(
            keys,
            features.values(),
            features.weights_or_none(),
            lengths=features.lengths().new_zeros(len(keys)),
            stride=1,
        )

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


def _completed(ctx: SequenceContext, awaitable: Any) -> Any:
    if not ctx.has_bags:
        awaitable.callbacks.append(_without_bags)
    return awaitable


def _without_bags(found: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
    return {
        name: JaggedTensor(values=of.values(), weights=of.weights_or_none(), lengths=of.lengths()[:0])
        for name, of in found.items()
    }


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
