"""TorchRec's sharding types for plain and compositional tables.

`_Compositional` overrides three methods of each: ``create_input_dist`` checks ids, and encodes those of split rows;
``create_lookup`` returns our lookup; and ``create_output_dist`` may return `PooledAllToAll` or `UnevenReduceScatter`.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.dist_data import KJTAllToAll
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseSparseFeaturesDist,
    EmbeddingShardingContext,
)
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.sharding.cw_sequence_sharding import CwSequenceEmbeddingSharding
from torchrec.distributed.sharding.cw_sharding import CwPooledEmbeddingSharding
from torchrec.distributed.sharding.dp_sequence_sharding import DpSequenceEmbeddingSharding
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist, RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sequence_sharding import TwSequenceEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import BaseTwEmbeddingSharding, TwPooledEmbeddingSharding
from torchrec.distributed.sharding.twcw_sharding import TwCwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.types import ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.distributed.customized_kernel import is_fused, layout_or_none
from torchrec_qr.distributed.lookup_kernel import PooledLookup, SequenceLookup
from torchrec_qr.distributed.node_env import NodeEnv
from torchrec_qr.distributed.pooled_all_to_all import without_copies
from torchrec_qr.distributed.prepared_ids import PrepareIds
from torchrec_qr.distributed.two_dimensional import check_tables
from torchrec_qr.distributed.uneven_reduce_scatter import UnevenReduceScatter


class _Compositional:
    """A mixin of TorchRec's sharding types: see the module."""

    def create_input_dist(self, device: torch.device | None = None) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        input_dist: BaseSparseFeaturesDist[KeyedJaggedTensor] = super().create_input_dist(device)  # type: ignore[misc]
        prepare = PrepareIds(self._feature_tables(), device or self._device)  # type: ignore[attr-defined]
        input_dist.register_forward_pre_hook(lambda _, args: (prepare(args[0]), *args[1:]))
        if isinstance(self._env, NodeEnv):  # type: ignore[attr-defined]
            within: Any = input_dist
            within._dist = _WithinNode(within._dist._pg, within._dist._splits)
        return input_dist

    def create_output_dist(self, device: torch.device | None = None) -> BaseEmbeddingDist[Any, Any, Any]:
        output_dist: BaseEmbeddingDist[Any, Any, Any] = super().create_output_dist(device)  # type: ignore[misc]
        if isinstance(self, _SCATTERING) and dist.get_backend(self._pg) == "gloo":
            if isinstance(output_dist, RwPooledEmbeddingDist) and output_dist._codecs is None:
                return UnevenReduceScatter(output_dist)
            names = ", ".join(sorted({repr(table.name) for table in self._feature_tables()}))
            output_dist.register_forward_pre_hook(partial(_refuse_uneven_batches, names))
        return without_copies(output_dist, device or self._device)  # type: ignore[attr-defined]

    def bounded(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns the features of the input dist, with the ids of compositional tables in range."""
        return self._bounds(features)

    @cached_property
    def _bounds(self) -> PrepareIds:
        return PrepareIds(self._feature_tables(), None, encode=False)

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: Any = None,
    ) -> PooledLookup | SequenceLookup:
        is_data_parallel = isinstance(self, DpPooledEmbeddingSharding | DpSequenceEmbeddingSharding)
        device = device if device is not None else self._device  # type: ignore[attr-defined]
        if is_data_parallel and device is not None and device.type == "meta":
            # Take the CPU, as TorchRec's dense kernel does, because DDP reads values of its parameters.
            device = torch.device("cpu")
        if not is_data_parallel:
            check_tables(self._tables_of_ranks(), self._env)  # type: ignore[attr-defined]
        tables, env = self._compositional_tables(), self._env  # type: ignore[attr-defined]
        if isinstance(env, NodeEnv) and (dense := [table.name for table in tables if not is_fused(table)]):
            raise NotImplementedError(
                f"tables {dense}: a copy per node without a fused optimizer is not supported; allowed: the optimizer "
                "in fused_params of the sharder"
            )
        common: dict[str, Any] = {
            "tables": tables,
            "is_data_parallel": is_data_parallel,
            "device": device,
            "grouped_configs": self._grouped_embedding_configs_per_rank[env.rank],  # type: ignore[attr-defined]
            "pg": env.process_group if is_data_parallel else self._pg,  # type: ignore[attr-defined]
            "env": env,
            "peers": env.peers if isinstance(env, NodeEnv) else None,
        }
        if isinstance(self, _SEQUENCE):
            return SequenceLookup(**common)
        return PooledLookup(
            **common,
            feature_processor=feature_processor,
            scale_weight_gradients=not is_data_parallel,
            sharding_type=next((t for cls, t in _LOOKUP_TYPES if isinstance(self, cls)), None),
        )

    def _compositional_tables(self) -> list[ShardedEmbeddingTable]:
        tables = {t.name: t for t in self._tables_of_ranks() if layout_or_none(t) is not None}
        return sorted(tables.values(), key=lambda t: t.name)

    def _tables_of_ranks(self) -> Iterator[ShardedEmbeddingTable]:
        per_rank: list[list[GroupedEmbeddingConfig]] = self._grouped_embedding_configs_per_rank  # type: ignore[attr-defined]
        return (t for groups in per_rank for group in groups for t in group.embedding_tables)

    def _feature_tables(self) -> list[ShardedEmbeddingTable]:
        """Returns the table of each feature of the input dist, in the order of ``feature_names``."""
        per_rank: list[list[GroupedEmbeddingConfig]] = self._grouped_embedding_configs_per_rank  # type: ignore[attr-defined]
        if hasattr(self, "_grouped_embedding_configs_per_node"):
            per_rank = self._grouped_embedding_configs_per_node
        elif not isinstance(self, BaseTwEmbeddingSharding):
            per_rank = [per_rank[self._env.rank]]  # type: ignore[attr-defined]
        groups = [group for groups in per_rank for group in groups]
        return [t for group in groups for t in group.embedding_tables for _ in t.feature_names]


class _BlocksWithinNode(_Compositional):
    """A mixin of sharding types that split rows within a node. Row codes of 2^40 ids exceed TorchRec's int32 blocks."""

    def create_input_dist(self, device: torch.device | None = None) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        input_dist: Any = super().create_input_dist(device)
        sizes: list[int] = super()._get_feature_hash_sizes()  # type: ignore[misc]
        blocks = [-(-size // input_dist._local_size) for size in sizes]
        narrow = input_dist._feature_block_sizes_tensor
        input_dist._feature_block_sizes_tensor = torch.tensor(blocks, dtype=torch.int64, device=narrow.device)
        return cast(BaseSparseFeaturesDist[KeyedJaggedTensor], input_dist)

    def _get_feature_hash_sizes(self) -> list[int]:
        """Returns TorchRec's numbers of codes, as far as its blocks are int32."""
        sizes: list[int] = super()._get_feature_hash_sizes()  # type: ignore[misc]
        return [min(size, torch.iinfo(torch.int32).max) for size in sizes]


class _WithinNode(KJTAllToAll):
    """Sends ids within a node. TorchRec's pipelines join the splits of all tables in one collective of one group.

    They replace ``forward`` of an instance for that. A call here does not look it up there.
    """

    def __call__(self, features: KeyedJaggedTensor) -> Any:
        return KJTAllToAll.forward(self, features)


def _refuse_uneven_batches(tables: str, output_dist: nn.Module, args: tuple[Any, ...]) -> None:
    """Raises on all ranks if gloo cannot gather the gradients. Every rank has all sizes."""
    context = args[1] if len(args) > 1 else None
    sizes = context.batch_size_per_rank if isinstance(context, EmbeddingShardingContext) else []
    if torch.is_grad_enabled() and len(set(sizes)) > 1:
        raise ValueError(
            f"tables {tables}: batches of {sizes} bags of a feature on the ranks, in order, and gloo cannot gather "
            "gradients from batches of different sizes for table_row_wise, grid_shard, or row_wise with codecs of "
            "quantised communication; allowed: batches of one size, such as by padding or leaving out the last one, "
            "NCCL, row_wise without codecs, or a sharding type that keeps rows whole"
        )


def _with_compositional(sharding: type[Any], mixin: type[_Compositional] = _Compositional) -> type[Any]:
    return type(f"Compositional{sharding.__name__}", (mixin, sharding), {})


POOLED_SHARDINGS = {
    ShardingType.TABLE_WISE.value: _with_compositional(TwPooledEmbeddingSharding),
    ShardingType.COLUMN_WISE.value: _with_compositional(CwPooledEmbeddingSharding),
    ShardingType.TABLE_COLUMN_WISE.value: _with_compositional(TwCwPooledEmbeddingSharding),
    ShardingType.ROW_WISE.value: _with_compositional(RwPooledEmbeddingSharding),
    ShardingType.TABLE_ROW_WISE.value: _with_compositional(TwRwPooledEmbeddingSharding, _BlocksWithinNode),
    ShardingType.GRID_SHARD.value: _with_compositional(GridPooledEmbeddingSharding, _BlocksWithinNode),
    ShardingType.DATA_PARALLEL.value: _with_compositional(DpPooledEmbeddingSharding),
}
SEQUENCE_SHARDINGS = {
    ShardingType.TABLE_WISE.value: _with_compositional(TwSequenceEmbeddingSharding),
    ShardingType.COLUMN_WISE.value: _with_compositional(CwSequenceEmbeddingSharding),
    ShardingType.ROW_WISE.value: _with_compositional(RwSequenceEmbeddingSharding),
    ShardingType.DATA_PARALLEL.value: _with_compositional(DpSequenceEmbeddingSharding),
}
_SEQUENCE = tuple(SEQUENCE_SHARDINGS.values())
# The pooled ones with split rows, whose output dist is a reduce-scatter.
_SCATTERING = (RwPooledEmbeddingSharding, TwRwPooledEmbeddingSharding, GridPooledEmbeddingSharding)
# TorchRec's own ``create_lookup`` passes these for plain tables.
_LOOKUP_TYPES = (
    (RwPooledEmbeddingSharding, ShardingType.ROW_WISE),
    (TwRwPooledEmbeddingSharding, ShardingType.TABLE_ROW_WISE),
    (GridPooledEmbeddingSharding, ShardingType.TABLE_ROW_WISE),
)
