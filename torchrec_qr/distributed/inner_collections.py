"""Sharders of TorchRec's modules that have a collection inside, plain or compositional."""

from typing import Any

import torch
from torch import nn
from torchrec.distributed.fp_embeddingbag import (
    FeatureProcessedEmbeddingBagCollectionSharder,
    ShardedFeatureProcessedEmbeddingBagCollection,
)
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embedding_modules import BaseManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingEnv
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from torchrec_qr.distributed.embeddingbag import CompositionalEmbeddingBagCollectionSharder
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


class _RefusingCompositional(BaseManagedCollisionEmbeddingCollectionSharder[Any]):
    """A mixin that refuses a compositional collection behind managed collisions.

    TorchRec resets the row of an id that it evicts. Rows of partitions belong to other ids too.
    """

    def shard(self, module: BaseManagedCollisionEmbeddingCollection, *args: Any, **kwargs: Any) -> Any:
        _refuse(module)
        return super().shard(module, *args, **kwargs)  # type: ignore[call-overload]

    def shardable_parameters(self, module: BaseManagedCollisionEmbeddingCollection) -> dict[str, nn.Parameter]:
        _refuse(module)
        return super().shardable_parameters(module)


class ManagedCollisionBagSharder(_RefusingCompositional, ManagedCollisionEmbeddingBagCollectionSharder):
    """TorchRec's ``ManagedCollisionEmbeddingBagCollectionSharder``, which refuses compositional collections."""


class ManagedCollisionSequenceSharder(_RefusingCompositional, ManagedCollisionEmbeddingCollectionSharder):
    """TorchRec's ``ManagedCollisionEmbeddingCollectionSharder``, which refuses compositional collections."""


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


def _refuse(module: BaseManagedCollisionEmbeddingCollection) -> None:
    inside = module._embedding_module
    if _is_compositional(inside):
        tables = [config.name for config in module._managed_collision_collection.embedding_configs()]
        raise NotImplementedError(
            f"{type(module).__name__} of {type(inside).__name__}, tables {tables}: managed collision is not supported "
            "by sharded compositional collections, whose rows are shared and so cannot be reset when an id is "
            "evicted; allowed: plain tables in a collection of TorchRec's, or the module unsharded"
        )
