"""The sharder of quantised collections: each is copied, whole, to the device that a plan selects."""

import copy
import math
from typing import Any, cast

import torch
from torch import nn
from torchrec.distributed.embedding_types import BaseQuantEmbeddingSharder, EmbeddingComputeKernel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingEnv, ShardingType

from torchrec_qr.quant.quant_bag_collection import QuantCompositionalEmbeddingBagCollection
from torchrec_qr.quant.quantised_table import QuantisedTable

# The one entry of a collection in a plan.
ALL_TABLES = "all_tables"


class QuantCompositionalSharder(BaseQuantEmbeddingSharder[Any]):
    """Copies a quantised collection to one device, in the place of TorchRec's shards of its quantised collections.

    Compositional tables are small, so that all of them fit one device and one call looks them up. A plan has one entry
    for a collection, of the bytes of all its tables.

    Args:
        module_type (type[nn.Module]): the class of the collections.

    Example:
        >>> sharder = QuantCompositionalSharder(QuantCompositionalEmbeddingBagCollection)
        >>> sharder.sharding_types("cpu"), sharder.compute_kernels("table_wise", "cpu")
        (['table_wise'], ['quant'])
    """

    def __init__(self, module_type: type[nn.Module]) -> None:
        super().__init__()
        self._module_type = module_type

    @property
    def module_type(self) -> type[nn.Module]:
        return self._module_type

    def shardable_parameters(self, module: Any) -> dict[str, nn.Parameter]:
        """Returns one parameter without values, which has the bytes of all tables and the columns of the output."""
        size = sum(rows.numel() * rows.element_size() for rows in _tables(module).buffers())
        configs = [cast(QuantisedTable, table).config for table in _tables(module).children()]
        columns = sum(config.embedding_dim * len(config.feature_names) for config in configs)
        as_one = torch.empty(math.ceil(size / columns), columns, dtype=torch.uint8, device="meta")
        return {ALL_TABLES: nn.Parameter(as_one, requires_grad=False)}

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.TABLE_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [EmbeddingComputeKernel.QUANT.value]

    def shard(
        self,
        module: Any,
        params: EmbeddingModuleShardingPlan,
        env: ShardingEnv | dict[str, ShardingEnv],
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Any:
        """Returns a copy of the collection on the device of the plan, to and from which batches move.

        Args:
            module (Any): the collection.
            params (EmbeddingModuleShardingPlan): the plan of the collection.
            env (ShardingEnv | dict[str, ShardingEnv]): not used, because there is one process.
            device (torch.device | None): the meta device, for a copy without values; or any other.
            module_fqn (str | None): the name of the collection in its model, for errors.

        Raises:
            ValueError: the plan has no device for the collection.
        """
        spec: Any = getattr(params.get(ALL_TABLES), "sharding_spec", None)
        if spec is None:
            raise ValueError(
                f"collection {module_fqn!r}: the plan has entries for {sorted(params)}; allowed: one for {ALL_TABLES!r}"
            )
        target = spec.shards[0].placement.device()
        if device is not None and device.type == "meta":
            target = device
        # Let copies on one device share their rows, because nothing writes to them.
        moved = {id(rows): rows.to(target) for rows in _tables(module).buffers()}
        copied = copy.deepcopy(module, moved)
        copied.batches_move = target.type not in ("cpu", "meta")
        return copied


def _tables(module: Any) -> nn.Module:
    pooled = isinstance(module, QuantCompositionalEmbeddingBagCollection)
    return cast(nn.Module, module.embedding_bags if pooled else module.embeddings)
