"""Sharders of TorchRec's modules that have a collection inside, plain or compositional."""

from typing import Any, ClassVar

import torch
from torch import nn
from torchrec.distributed.fp_embeddingbag import (
    FeatureProcessedEmbeddingBagCollectionSharder,
    ShardedFeatureProcessedEmbeddingBagCollection,
)
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embedding_modules import BaseManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingEnv, ShardingEnv2D, ShardingType
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from torchrec_qr.distributed.embedding import CompositionalEmbeddingCollectionSharder
from torchrec_qr.distributed.embeddingbag import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.distributed.managed_collisions import ShardedManagedCollisionBags, ShardedManagedCollisionSequences
from torchrec_qr.distributed.sharder import CompositionalSharder
from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
from torchrec_qr.modules.embedding_collection import CompositionalEmbeddingCollection


class FeatureProcessedSharder(FeatureProcessedEmbeddingBagCollectionSharder):
    """TorchRec's sharder of feature processors in front of a collection, plain or compositional.

    For an optimizer in ``fused_params``, pass our sharder to TorchRec's own one:
    ``FeatureProcessedEmbeddingBagCollectionSharder(ebc_sharder=CompositionalEmbeddingBagCollectionSharder(…))``.
    """

    def shard(
        self,
        module: FeatureProcessedEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedFeatureProcessedEmbeddingBagCollection:
        if _is_compositional(module._embedding_bag_collection):
            return _OF_COMPOSITIONAL.shard(module, params, env, device, module_fqn)
        return super().shard(module, params, env, device, module_fqn)

    def shardable_parameters(self, module: FeatureProcessedEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        if _is_compositional(module._embedding_bag_collection):
            return _OF_COMPOSITIONAL.shardable_parameters(module)
        return super().shardable_parameters(module)


# Ignore the type, because TorchRec annotates its own class, and calls only methods that ours has.
_OF_COMPOSITIONAL = FeatureProcessedEmbeddingBagCollectionSharder(
    ebc_sharder=CompositionalEmbeddingBagCollectionSharder()  # type: ignore[arg-type]
)


class _ManagedCollisionSharder(BaseManagedCollisionEmbeddingCollectionSharder[Any]):
    """A mixin of TorchRec's two sharders of managed collisions, for either collection inside.

    A sharder of ours shards a collection of ours, with the ``fused_params`` and the codecs of TorchRec's one.
    """

    _inside: ClassVar[type[CompositionalSharder[Any]]]
    _sharded: ClassVar[Any]
    # True if the module of the last call of `shardable_parameters` has a collection of ours.
    _is_ours = False

    def shard(
        self,
        module: BaseManagedCollisionEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Any:
        """Returns the sharded module."""
        if not _is_compositional(module._embedding_module):
            return super().shard(module, params, env, device, module_fqn)  # type: ignore[call-overload]
        if isinstance(env, ShardingEnv2D):
            raise NotImplementedError(
                f"tables {list(params)}: managed collisions in front of a compositional collection are not supported "
                "under DMPCollection, whose sync() averages neither the slots nor the tables behind them; allowed: "
                "DistributedModelParallel, or a compositional table of raw ids with id_hash='splitmix64'"
            )
        return self._sharded(module, params, self._of_compositional(), env, device or torch.device("cuda"))

    def shardable_parameters(self, module: BaseManagedCollisionEmbeddingCollection) -> dict[str, nn.Parameter]:
        self._is_ours = _is_compositional(module._embedding_module)
        if self._is_ours:
            return self._of_compositional().shardable_parameters(module._embedding_module)
        return super().shardable_parameters(module)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Returns the sharding types of the module that `shardable_parameters` was called with last."""
        return [ShardingType.ROW_WISE.value] if self._is_ours else super().sharding_types(compute_device_type)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Returns the kernels of the module that `shardable_parameters` was called with last."""
        if self._is_ours:
            return self._of_compositional().compute_kernels(sharding_type, compute_device_type)
        return super().compute_kernels(sharding_type, compute_device_type)

    def _of_compositional(self) -> CompositionalSharder[Any]:
        return self._inside(self.fused_params, self._e_sharder.qcomm_codecs_registry)


class ManagedCollisionBagSharder(_ManagedCollisionSharder, ManagedCollisionEmbeddingBagCollectionSharder):
    """TorchRec's ``ManagedCollisionEmbeddingBagCollectionSharder``, for a collection of ours or TorchRec's inside.

    Args:
        fused_params (dict[str, Any] | None): the fused optimizer of all tables.
        qcomm_codecs_registry (dict[str, Any] | None): TorchRec's codecs of embeddings that ranks send.

    Example:
        >>> from torchrec_qr.distributed.inner_collections import ManagedCollisionBagSharder
        >>> ManagedCollisionBagSharder(fused_params={"learning_rate": 0.1}).module_type.__name__
        'ManagedCollisionEmbeddingBagCollection'
    """

    _inside = CompositionalEmbeddingBagCollectionSharder
    _sharded = ShardedManagedCollisionBags


class ManagedCollisionSequenceSharder(_ManagedCollisionSharder, ManagedCollisionEmbeddingCollectionSharder):
    """TorchRec's ``ManagedCollisionEmbeddingCollectionSharder``, for a collection of ours or TorchRec's inside."""

    _inside = CompositionalEmbeddingCollectionSharder
    _sharded = ShardedManagedCollisionSequences


def with_compositional_inside(sharders: list[ModuleSharder[Any]]) -> list[ModuleSharder[Any]]:
    """Returns ``sharders`` with ours for modules that have a collection inside."""
    ours: list[ModuleSharder[Any]] = [
        FeatureProcessedSharder(),
        ManagedCollisionBagSharder(),
        ManagedCollisionSequenceSharder(),
    ]
    replaced = {sharder.module_type for sharder in ours}
    return [*(s for s in sharders if s.module_type not in replaced), *ours]


def _is_compositional(collection: nn.Module) -> bool:
    return isinstance(collection, CompositionalEmbeddingBagCollection | CompositionalEmbeddingCollection)
