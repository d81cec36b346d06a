"""What the two sharders share."""

from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn
from torchrec.distributed.embedding_types import BaseEmbeddingSharder
from torchrec.distributed.types import ParameterSharding, ShardingEnv

from torchrec_qr.distributed.collection import compute_kernels
from torchrec_qr.distributed.own_device import on_own_device

M = TypeVar("M", bound=nn.Module)


class CompositionalSharder(BaseEmbeddingSharder[M], Generic[M]):
    """A sharder by the classes that it turns into one another, and the sharding types that the latter has."""

    _unsharded: ClassVar[type[nn.Module]]
    _sharded: ClassVar[type[nn.Module]]
    _shardings: ClassVar[dict[str, Any]]

    def shard(
        self,
        module: M,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Any:
        """Returns the sharded module for the plan ``params`` of its tables.

        Raises:
            NotImplementedError, ValueError: see `torchrec_qr.distributed.collection.check_plan`.
        """
        return self._sharded(
            module,
            on_own_device(params, env.rank, device),
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
        """Returns the sharding types: each works on every device, row-wise too for every kind of partitions."""
        return list(self._shardings)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Returns ``["fused"]``, or ``["dense"]`` under data-parallel; TorchRec's cached kernels are not supported."""
        return compute_kernels(sharding_type)

    @property
    def module_type(self) -> Any:
        return self._unsharded

    @property
    def sharded_module_type(self) -> Any:
        return self._sharded

    def _options(self) -> dict[str, Any]:
        """Further arguments of the sharded module."""
        return {}
