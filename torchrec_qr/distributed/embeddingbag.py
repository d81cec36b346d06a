"""The sharded pooled collection and its sharder."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_qr.distributed.logical_tables import is_divided
from torchrec_qr.distributed.node_env import node_env_of
from torchrec_qr.distributed.per_node_plan import is_per_node, within_node
from torchrec_qr.distributed.sharded_collection import ShardedCompositionalCollection, checked_features
from torchrec_qr.distributed.sharder import CompositionalSharder
from torchrec_qr.distributed.sharding import POOLED_SHARDINGS
from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
from torchrec_qr.variable_batches import bags_of_samples, samples_of, with_one_number_of_bags


class _Means(NamedTuple):
    """How pooled features are divided.

    Args:
        features (Tensor): (F,) the position of each in the batch.
        is_mean (Tensor): (F, 1) whether its sums are divided.
        columns (Tensor): (ΣD,) the feature that each column of the output is of.
    """

    features: Tensor
    is_mean: Tensor
    columns: Tensor


@dataclass
class CompositionalContext(EmbeddingBagCollectionContext):
    """Adds the bags of a batch.

    Args:
        bag_sizes (Tensor | None): (F, B) the number of ids of every bag, which MEAN pooling divides by.
        means (_Means | None): how it divides.
        bags (Tensor | None): (F, samples) the bag of every sample: see `torchrec_qr.variable_batches`.
    """

    bag_sizes: Tensor | None = None
    means: _Means | None = None
    bags: Tensor | None = None

    def record_stream(self, stream: torch.Stream) -> None:
        super().record_stream(stream)
        for tensor in (self.bag_sizes, self.bags):
            if tensor is not None:
                tensor.record_stream(stream)


class ShardedCompositionalEmbeddingBagCollection(ShardedCompositionalCollection, ShardedEmbeddingBagCollection):
    """`CompositionalEmbeddingBagCollection`, sharded by a plan with one ``ParameterSharding`` per logical table.

    It is a ``ShardedEmbeddingBagCollection`` of TorchRec. Ids are sent once. Ranks look up, compose and sum the rows
    that they own, and send D floats per bag, whatever K. The ``state_dict`` has the keys of the unsharded module under
    every plan.
    """

    _tables_attribute = "embedding_bags"

    # Draw the values of a module on a CPU anew, because TorchRec's pooled collection does.
    _drawn_anew = ("meta", "cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Leave plain tables alone to TorchRec's check of the first batch, because it warns of ids outside [0, S), which
        # a hash or a policy of ours allows.
        self._embedding_bag_configs = [c for c in self._embedding_bag_configs if c.name not in self._layouts]

    def _prepare(self, plan: Mapping[str, ParameterSharding]) -> None:
        configs: Any = self._configs
        self._config_of = {
            name: config
            for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True)
            for name in names
        }
        # Do not take the feature from the name of an output, because features may have an "@" of their own.
        self._feature_of = dict(zip(self._config_of, (f for c in configs for f in c.feature_names), strict=True))
        self._divided = {config.name for config in configs if is_divided(config, plan)}
        self._means: dict[Any, _Means] = {}

    @classmethod
    def create_embedding_bag_sharding(
        cls,
        sharding_infos: list[Any],
        env: ShardingEnv,
        device: torch.device | None = None,
        permute_embeddings: bool = False,
        qcomm_codecs_registry: Any = None,
    ) -> Any:
        sharding_type = sharding_infos[0].param_sharding.sharding_type
        env = node_env_of(env) if is_per_node(sharding_type) else env
        sharding_type = within_node(sharding_type)
        kwargs: dict[str, Any] = {}
        if sharding_type != ShardingType.DATA_PARALLEL.value:
            kwargs["qcomm_codecs_registry"] = qcomm_codecs_registry
        if sharding_type in (ShardingType.COLUMN_WISE.value, ShardingType.TABLE_COLUMN_WISE.value):
            kwargs["permute_embeddings"] = permute_embeddings
        return POOLED_SHARDINGS[sharding_type](sharding_infos, env, device, **kwargs)

    def create_context(self) -> CompositionalContext:
        return CompositionalContext()

    def input_dist(self, ctx: CompositionalContext, features: KeyedJaggedTensor) -> Any:  # type: ignore[override]
        return super().input_dist(ctx, self.prepared(ctx, features))

    def prepared(self, ctx: CompositionalContext, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns a batch for an input dist, and keeps in ``ctx`` what the output needs."""
        given = checked_features(self, features)
        features = with_one_number_of_bags(given)
        ctx.bags = bags_of_samples(given, self._output_features)
        if self._divided:
            sizes = features.lengths().view(len(features.keys()), -1)
            ctx.means = self._means_of(features.keys(), sizes.device)
            ctx.bag_sizes = sizes.index_select(0, ctx.means.features)
        return features

    def output_dist(self, ctx: CompositionalContext, output: list[Tensor]) -> Any:  # type: ignore[override]
        return self._completed(ctx, super().output_dist(ctx, output))

    def compute_and_output_dist(self, ctx: CompositionalContext, input: Any) -> Any:  # type: ignore[override]
        return self._completed(ctx, super().compute_and_output_dist(ctx, input))

    def update_shards(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("dynamic resharding is not supported by sharded compositional collections")

    @property
    def unsharded_module_type(self) -> type[CompositionalEmbeddingBagCollection]:  # type: ignore[override]
        return CompositionalEmbeddingBagCollection

    def _completed(self, ctx: CompositionalContext, awaitable: Any) -> Any:
        if ctx.bag_sizes is not None and ctx.means is not None:
            awaitable.callbacks.append(partial(_divide, ctx.bag_sizes, ctx.means))
        if ctx.bags is not None:
            awaitable.callbacks.append(partial(_of_samples, ctx.bags))
        return awaitable

    @cached_property
    def _output_features(self) -> list[str]:
        """The feature of each output, in the order of the outputs."""
        return [self._feature_of[name] for name in self._embedding_names]

    def _means_of(self, keys: list[str], device: torch.device) -> _Means:
        """Returns what batches of these keys share, made once, because a copy to a GPU makes the host wait."""
        found = self._means.get((device, *keys))
        if found is None:
            index = {key: i for i, key in enumerate(keys)}
            configs = [self._config_of[name] for name in self._embedding_names]
            columns = [i for i, config in enumerate(configs) for _ in range(config.embedding_dim)]
            found = self._means[device, *keys] = _Means(
                torch.tensor([index[feature] for feature in self._output_features], device=device),
                torch.tensor([[config.name in self._divided] for config in configs], device=device),
                torch.tensor(columns, device=device),
            )
        return found


class CompositionalEmbeddingBagCollectionSharder(CompositionalSharder[CompositionalEmbeddingBagCollection]):
    """Shards `CompositionalEmbeddingBagCollection`, like TorchRec's ``EmbeddingBagCollectionSharder``.

    Args:
        fused_params (dict[str, Any] | None): the fused optimizer of all tables, as in TorchRec: ``optimizer``,
            ``learning_rate``, ``eps``, ``gradient_clipping``, ``max_gradient``, and for Adam ``beta1``, ``beta2``,
            ``amsgrad``. With another key, sharding a table raises NotImplementedError.
        qcomm_codecs_registry (dict[str, Any] | None): TorchRec's codecs of embeddings that ranks send.

    Example:
        >>> from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
        >>> CompositionalEmbeddingBagCollectionSharder().compute_kernels("row_wise", "cpu")
        ['fused']
    """

    _unsharded = CompositionalEmbeddingBagCollection
    _sharded = ShardedCompositionalEmbeddingBagCollection
    _shardings = POOLED_SHARDINGS


def _divide(bag_sizes: Tensor, means: _Means, pooled: KeyedTensor) -> KeyedTensor:
    """Divides the features of MEAN pooling in (B, ΣD) by the ids of their bags (features, B), or by 1 if empty."""
    divisors = torch.where(means.is_mean, bag_sizes.clamp(min=1), 1).T.to(pooled.values().dtype)
    return KeyedTensor(
        keys=pooled.keys(),
        length_per_key=pooled.length_per_key(),
        values=pooled.values() / divisors.index_select(1, means.columns),
    )


def _of_samples(bags: Tensor, pooled: KeyedTensor) -> KeyedTensor:
    dims = pooled.length_per_key()
    return KeyedTensor(keys=pooled.keys(), length_per_key=dims, values=samples_of(pooled.values(), dims, bags))
