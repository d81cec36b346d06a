"""The base of both sharders, which offers sharding types and compute kernels to planners."""

from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, EmbeddingComputeKernel
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingEnv,
    ShardingEnv2D,
    ShardMetadata,
)

from torchrec_qr.configs import is_compositional
from torchrec_qr.distributed.layout import DATA_PARALLEL
from torchrec_qr.distributed.logical_tables import placeholders
from torchrec_qr.distributed.per_node_plan import on_own_node

FUSED = EmbeddingComputeKernel.FUSED.value
DENSE = EmbeddingComputeKernel.DENSE.value

M = TypeVar("M", bound=nn.Module)


class CompositionalSharder(BaseEmbeddingSharder[M], Generic[M]):
    """A sharder that turns a collection into its sharded twin."""

    _unsharded: ClassVar[type[nn.Module]]
    _sharded: ClassVar[Any]
    _shardings: ClassVar[dict[str, Any]]
    # Whether the collection of the last call of `shardable_parameters` has plain tables alone.
    _all_plain = False

    def shard(
        self,
        module: M,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Any:
        """Returns the sharded module.

        Args:
            module (M): the collection.
            params (dict[str, ParameterSharding]): the plan of its tables.
            env (ShardingEnv): the ranks.
            device (torch.device | None): the device of this rank.
            module_fqn (str | None): the path of the module in the model.

        Raises:
            NotImplementedError, ValueError: see `torchrec_qr.distributed.logical_tables.check_plan`, and
                `torchrec_qr.distributed.per_node_plan.on_own_node`.
        """
        collection: Any = module
        plan = on_own_node(params, env, collection.embedding_configs())
        return self._sharded(
            module,
            on_own_device(plan, env.global_rank if isinstance(env, ShardingEnv2D) else env.rank, device),
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            **self._options(),
        )

    def reshard(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError: TorchRec's dynamic resharding is not supported."""
        raise NotImplementedError("dynamic resharding is not supported by sharded compositional collections")

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Returns the sharding types, each for every device."""
        return list(self._shardings)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Returns what all tables may have of the collection that `shardable_parameters` was called with last.

        TorchRec's planners call the two in turn for each collection. If all tables are plain, the kernels are those of
        TorchRec's sharder. Otherwise they are those of `compute_kernels_of` a compositional table, and a plan by hand
        may have others for plain tables.
        """
        return self.compute_kernels_of(not self._all_plain, sharding_type, compute_device_type)

    def compute_kernels_of(self, compositional: bool, sharding_type: str, compute_device_type: str) -> list[str]:
        """Returns the kernels of a table: TorchRec's of a plain one, ``fused`` or ``dense`` of a compositional one.

        Args:
            compositional (bool): whether the table is compositional.
            sharding_type (str): its sharding type.
            compute_device_type (str): the type of the device.
        """
        if not compositional:
            return super().compute_kernels(sharding_type, compute_device_type)
        return [DENSE if sharding_type == DATA_PARALLEL else FUSED]

    def shardable_parameters(self, module: M) -> dict[str, nn.Parameter]:
        """Returns one parameter per logical table, (R, D) on the meta device for a compositional one."""
        collection: Any = module
        self._all_plain = not any(map(is_compositional, collection.embedding_configs()))
        return placeholders(collection.embedding_configs(), getattr(collection, self._sharded._tables_attribute))

    @property
    def module_type(self) -> Any:
        return self._unsharded

    @property
    def sharded_module_type(self) -> Any:
        return self._sharded

    def _options(self) -> dict[str, Any]:
        """Returns further arguments of the sharded module."""
        return {}


def on_own_device(
    plan: dict[str, ParameterSharding], rank: int, device: torch.device | None
) -> dict[str, ParameterSharding]:
    """Returns a copy of a plan whose shards on ``rank`` are on ``device``.

    Planners put the shards of rank r on ``cuda:(r % ranks of a node)``. A rank with one visible GPU, under Slurm's
    ``--gpus-per-task=1``, has it as ``cuda:0``. ``ShardedTensor`` refuses another device than the plan's, also if a
    plan for a real device is carried out on the meta device.

    Args:
        plan (dict[str, ParameterSharding]): the plan of a collection.
        rank (int): this rank as the plan numbers it.
        device (torch.device | None): the device of this rank. The function returns ``plan`` for None.
    """
    if device is None:
        return plan
    return {name: _on_device(sharding, rank, device) for name, sharding in plan.items()}


def _on_device(sharding: ParameterSharding, rank: int, device: torch.device) -> ParameterSharding:
    spec = sharding.sharding_spec
    if not isinstance(spec, EnumerableShardingSpec):
        return sharding
    shards = []
    for shard in spec.shards:
        placement = shard.placement
        if isinstance(placement, _remote_device):
            # On the meta device move all shards, as TorchRec does.
            own = device.type == "meta" or placement.rank() == rank
            placement = _remote_device(f"rank:{placement.rank()}/{device}") if own else placement
        shards.append(ShardMetadata(list(shard.shard_offsets), list(shard.shard_sizes), placement))
    return replace(sharding, sharding_spec=EnumerableShardingSpec(shards))
