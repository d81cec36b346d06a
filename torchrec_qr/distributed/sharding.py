"""TorchRec's shardings, with compositional tables among the tables of one.

Each sharding type of TorchRec is subclassed by `_Compositional`, which overrides three of its hooks: ``_shard``,
where configs and TorchRec's descriptions of shards meet; ``create_input_dist``, before which ids are checked and, where
rows are split, encoded; and ``create_lookup``.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseSparseFeaturesDist,
    EmbeddingShardingContext,
    EmbeddingShardingInfo,
)
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.sharding.cw_sequence_sharding import CwSequenceEmbeddingSharding
from torchrec.distributed.sharding.cw_sharding import CwPooledEmbeddingSharding
from torchrec.distributed.sharding.dp_sequence_sharding import DpSequenceEmbeddingSharding
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sequence_sharding import TwSequenceEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import BaseTwEmbeddingSharding, TwPooledEmbeddingSharding
from torchrec.distributed.sharding.twcw_sharding import TwCwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.types import ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.distributed.codes import RowCode
from torchrec_qr.distributed.local_shard import ReplicatedPartitions
from torchrec_qr.distributed.lookup import CompositionalKernel, Replicas
from torchrec_qr.distributed.placement import Placed, place, placed
from torchrec_qr.distributed.pooled_all_to_all import without_copies
from torchrec_qr.distributed.shards import ROW_SPLIT, block_rows, num_row_blocks
from torchrec_qr.ids import IdSpace, bounded_ids, raise_if_outside
from torchrec_qr.late_errors import raise_pending
from torchrec_qr.ops.backends import cpu
from torchrec_qr.ops.description import kernels_have
from torchrec_qr.ops.dispatch import available
from torchrec_qr.partitions.class_map import class_map_on


class _CompositionalLookup:
    """Creates `CompositionalKernel` for groups of compositional tables, and hands it the replicated partitions."""

    _sequence: bool
    _emb_modules: nn.ModuleList
    _replicated: nn.Module
    # True if ranks hold these tables whole and look up their own samples; `_Compositional.create_lookup` sets it.
    is_data_parallel: bool

    def add_replicas(self, tables: list[ShardedEmbeddingTable], device: torch.device | None) -> None:
        """``tables``: the compositional tables of this sharding type on all ranks, each once."""
        self._replicated = Replicas(tables, device)
        used = {key for kernel in self.kernels() for key in kernel.uses()}
        self._unused = [i for i, key in enumerate(self._replicas().parameters_of) if key not in used]

    def kernels(self) -> Iterator[CompositionalKernel]:
        return (m for m in self._emb_modules if isinstance(m, CompositionalKernel))

    def replicate(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Has DDP reduce the replicas of this lookup alone, where it isn't wrapped as a whole."""
        if self._replicas().parameters_of and not isinstance(self._replicated, DistributedDataParallel):
            self._replicated = wrap(self._replicated)

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        weights: list[Tensor] = self._replicated() if self._replicas().parameters_of else []
        by_partition = dict(zip(self._replicas().parameters_of, weights, strict=True))
        for kernel in self.kernels():
            kernel.replicas = ReplicatedPartitions(by_partition, self._replicas().touched_of)
        out: Tensor = super().forward(sparse_features)  # type: ignore[misc]
        for i in self._unused:
            # Ranks that own none of a table reduce its replicas with the others: DDP waits for every gradient.
            out = out + weights[i][:0].sum()
        return out

    @torch.no_grad()
    def warm_up(self) -> None:
        """Has the kernels of a step compiled, where they run on a GPU; see `torchrec_qr.distributed.warm_up`."""
        replicas = self._replicas()
        weights = {key: p.detach() for key, p in replicas.parameters_of.items()}
        for kernel in self.kernels():
            kernel.warm_up(ReplicatedPartitions(weights, replicas.touched_of))
        replicas.warm_up()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters(prefix, recurse, remove_duplicate)  # type: ignore[misc]
        if recurse:
            yield from self._replicated.named_parameters(f"{prefix}_replicated", recurse)

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters_by_table()  # type: ignore[misc]
        yield from self._replicas().named_parameters_by_table()

    def _create_embedding_kernel(self, config: GroupedEmbeddingConfig, *args: Any, **kwargs: Any) -> BaseEmbedding:
        if placed(config.embedding_tables[0]) is None:
            kernel: BaseEmbedding = super()._create_embedding_kernel(config, *args, **kwargs)  # type: ignore[misc]
            return kernel
        # The two lookups of TorchRec pass these in different orders.
        pg = next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
        device = next((a for a in args if isinstance(a, torch.device)), None)
        return CompositionalKernel(config, pg, device, self._sequence)

    def _replicas(self) -> Replicas:
        module = self._replicated
        replicas = module.module if isinstance(module, DistributedDataParallel) else module
        assert isinstance(replicas, Replicas)
        return replicas


class PooledLookup(_CompositionalLookup, GroupedPooledEmbeddingsLookup):  # type: ignore[misc]
    _sequence = False


class SequenceLookup(_CompositionalLookup, GroupedEmbeddingsLookup):  # type: ignore[misc]
    _sequence = True


class _Compositional:
    """A sharding type of TorchRec whose tables may be compositional; see the module."""

    def _shard(self, sharding_infos: list[EmbeddingShardingInfo]) -> list[list[ShardedEmbeddingTable]]:
        per_rank: list[list[ShardedEmbeddingTable]] = super()._shard(sharding_infos)  # type: ignore[misc]
        infos = {info.embedding_config.name: info for info in sharding_infos}
        for table in (table for tables in per_rank for table in tables):
            config: CompositionalConfig | None = getattr(infos[table.name].embedding_config, "compositional", None)
            if config is None:
                continue
            sharding_type = infos[table.name].param_sharding.sharding_type
            place(table, config, sharding_type, frozen=not infos[table.name].param.requires_grad)
            # TorchRec groups by these: it must not put a plain and a compositional table into one kernel.
            table.fused_params = {**(table.fused_params or {}), "_batch_key": "compositional"}
            if sharding_type in ROW_SPLIT:
                assert table.global_metadata is not None
                blocks = num_row_blocks(table.global_metadata.shards_metadata)
                # TorchRec cuts at multiples of ⌈num_embeddings / blocks⌉: here, of a block of base rows in codes.
                table.num_embeddings = blocks * block_rows(config, blocks) * RowCode(config).codes_per_row
        return per_rank

    def create_input_dist(self, device: torch.device | None = None) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        input_dist: BaseSparseFeaturesDist[KeyedJaggedTensor] = super().create_input_dist(device)  # type: ignore[misc]
        prepare = _PrepareIds(self._feature_tables(), device or self._device)  # type: ignore[attr-defined]
        input_dist.register_forward_pre_hook(lambda _, args: (prepare(args[0]), *args[1:]))
        return input_dist

    def create_output_dist(self, device: torch.device | None = None) -> BaseEmbeddingDist[Any, Any, Any]:
        output_dist: BaseEmbeddingDist[Any, Any, Any] = super().create_output_dist(device)  # type: ignore[misc]
        if isinstance(self, _SCATTERING) and dist.get_backend(self._pg) == "gloo":
            names = ", ".join(sorted({repr(table.name) for table in self._feature_tables()}))
            output_dist.register_forward_pre_hook(partial(_refuse_uneven_batches, names))
        return without_copies(output_dist, device or self._device)  # type: ignore[attr-defined]

    def bounded(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features that the input dist takes, with the ids of compositional tables brought into range."""
        return _PrepareIds(self._feature_tables(), features.device(), encode=False)(features)

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: Any = None,
    ) -> PooledLookup | SequenceLookup:
        data_parallel = isinstance(self, DpPooledEmbeddingSharding | DpSequenceEmbeddingSharding)
        common: dict[str, Any] = {
            "grouped_configs": self._grouped_embedding_configs_per_rank[self._env.rank],  # type: ignore[attr-defined]
            "pg": self._env.process_group if data_parallel else self._pg,  # type: ignore[attr-defined]
            "device": device if device is not None else self._device,  # type: ignore[attr-defined]
            "env": self._env,  # type: ignore[attr-defined]
        }
        lookup: PooledLookup | SequenceLookup
        if isinstance(self, _SEQUENCE):
            lookup = SequenceLookup(**common)
        else:
            lookup = PooledLookup(
                **common,
                feature_processor=feature_processor,
                scale_weight_gradients=not data_parallel,
                sharding_type=next((t for cls, t in _LOOKUP_TYPES if isinstance(self, cls)), None),
            )
        lookup.is_data_parallel = data_parallel
        lookup.add_replicas(self._compositional_tables(), common["device"])
        return lookup

    def _compositional_tables(self) -> list[ShardedEmbeddingTable]:
        per_rank: list[list[GroupedEmbeddingConfig]] = self._grouped_embedding_configs_per_rank  # type: ignore[attr-defined]
        tables = (t for groups in per_rank for group in groups for t in group.embedding_tables)
        return sorted({t.name: t for t in tables if placed(t) is not None}.values(), key=lambda t: t.name)

    def _feature_tables(self) -> list[ShardedEmbeddingTable]:
        """The table of each feature that the input dist takes, in its order (that of ``feature_names``)."""
        per_rank: list[list[GroupedEmbeddingConfig]] = self._grouped_embedding_configs_per_rank  # type: ignore[attr-defined]
        if hasattr(self, "_grouped_embedding_configs_per_node"):
            per_rank = self._grouped_embedding_configs_per_node
        elif not isinstance(self, BaseTwEmbeddingSharding):
            per_rank = [per_rank[self._env.rank]]  # type: ignore[attr-defined]
        groups = [group for groups in per_rank for group in groups]
        return [t for group in groups for t in group.embedding_tables for _ in t.feature_names]


class _PrepareIds:
    """Brings the ids of compositional features into range, and, if ``encode``, encodes those whose rows are split."""

    def __init__(self, tables: list[ShardedEmbeddingTable], device: torch.device | None, encode: bool = True) -> None:
        self._places = [placed(t) for t in tables]
        self._encode = encode
        self._class_maps: dict[str, Tensor] = {}
        for at in self._places:
            if encode and at is not None and at.sharding_type in ROW_SPLIT:
                class_map = class_map_on(at.config.bound_partitions, device)
                if class_map is not None:
                    self._class_maps[at.config.name] = class_map

    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        if not any(self._places):
            return features
        raise_pending(wait=False)
        values = features.values()
        if values.dtype == torch.int64 and all(self._is_only_checked(at, values.device) for at in self._places):
            if values.device.type == "cpu":
                self._check(features)
            return features
        starts = features.offset_per_key()
        ids = []
        # A feature comes once per column shard of its table, with the same ids.
        prepared: dict[tuple[str, str], Tensor] = {}
        for (start, end), feature, at in zip(pairwise(starts), features.keys(), self._places, strict=True):
            if at is None:
                # One type for all: codes of one feature may need int64 where the ids of all came as int32.
                ids.append(values[start:end].to(torch.int64))
                continue
            key = (at.config.name, feature)
            if key not in prepared:
                prepared[key] = self._prepare(values[start:end], feature, at)
            ids.append(prepared[key])
        return KeyedJaggedTensor(
            keys=features.keys(),
            values=torch.cat(ids),
            weights=features.weights_or_none(),
            lengths=features.lengths(),
            offsets=features.offsets(),
            stride=features.stride(),
            length_per_key=features.length_per_key(),
        )

    def _is_only_checked(self, at: Placed | None, device: torch.device) -> bool:
        """Whether the ids of a feature pass as they are, unless they raise."""
        if at is None:
            return True
        if (self._encode and at.sharding_type in ROW_SPLIT) or at.config.out_of_range not in ("error", "unchecked"):
            return False
        if device.type == "cpu":
            return cpu.available()
        # There the kernels check each id where they read its rows, so that nothing need be launched for it here.
        return available(device) and kernels_have(at.config.operation, at.config.partition_columns)

    def _check(self, features: KeyedJaggedTensor) -> None:
        """Looks at all ids of a batch on a CPU in one pass."""
        bounds = cpu.id_bounds(features.values(), features.offset_per_key())
        for at, feature, (low, high) in zip(self._places, features.keys(), bounds, strict=True):
            if at is not None and at.config.out_of_range == "error" and low <= high:
                raise_if_outside(low, high, _id_space(at, feature))

    def _prepare(self, ids: Tensor, feature: str, at: Placed) -> Tensor:
        config = at.config
        ids = bounded_ids(ids, _id_space(at, feature))
        if not self._encode or at.sharding_type not in ROW_SPLIT:
            return ids
        return RowCode(config).encode(ids, self._class_maps.get(config.name))


def _refuse_uneven_batches(tables: str, output_dist: nn.Module, args: tuple[Any, ...]) -> None:
    """Raises where gloo could not gather the gradients. Every rank knows all sizes, so all of them raise."""
    context = args[1] if len(args) > 1 else None
    sizes = context.batch_size_per_rank if isinstance(context, EmbeddingShardingContext) else []
    if torch.is_grad_enabled() and len(set(sizes)) > 1:
        raise ValueError(
            f"tables {tables}: batches of {sizes} samples on the ranks, in order, and gloo cannot gather gradients of "
            "tables whose rows are split from batches of different sizes; allowed: batches of one size, such as by "
            "padding or leaving out the last one, NCCL, or another sharding type"
        )


def _id_space(at: Placed, feature: str) -> IdSpace:
    return IdSpace(at.config.name, feature, at.config.num_embeddings, at.config.out_of_range)


class TwPooled(_Compositional, TwPooledEmbeddingSharding):
    pass


class CwPooled(_Compositional, CwPooledEmbeddingSharding):
    pass


class TwCwPooled(_Compositional, TwCwPooledEmbeddingSharding):
    pass


class RwPooled(_Compositional, RwPooledEmbeddingSharding):
    pass


class TwRwPooled(_Compositional, TwRwPooledEmbeddingSharding):
    pass


class GridPooled(_Compositional, GridPooledEmbeddingSharding):
    pass


class DpPooled(_Compositional, DpPooledEmbeddingSharding):
    pass


class TwSequence(_Compositional, TwSequenceEmbeddingSharding):
    pass


class CwSequence(_Compositional, CwSequenceEmbeddingSharding):
    pass


class RwSequence(_Compositional, RwSequenceEmbeddingSharding):
    pass


class DpSequence(_Compositional, DpSequenceEmbeddingSharding):
    pass


POOLED_SHARDINGS = {
    ShardingType.TABLE_WISE.value: TwPooled,
    ShardingType.COLUMN_WISE.value: CwPooled,
    ShardingType.TABLE_COLUMN_WISE.value: TwCwPooled,
    ShardingType.ROW_WISE.value: RwPooled,
    ShardingType.TABLE_ROW_WISE.value: TwRwPooled,
    ShardingType.GRID_SHARD.value: GridPooled,
    ShardingType.DATA_PARALLEL.value: DpPooled,
}
SEQUENCE_SHARDINGS = {
    ShardingType.TABLE_WISE.value: TwSequence,
    ShardingType.COLUMN_WISE.value: CwSequence,
    ShardingType.ROW_WISE.value: RwSequence,
    ShardingType.DATA_PARALLEL.value: DpSequence,
}
_SEQUENCE = tuple(SEQUENCE_SHARDINGS.values())
# Pooled, with rows split: their outputs are summed by a reduce-scatter.
_SCATTERING = (RwPooledEmbeddingSharding, TwRwPooledEmbeddingSharding, GridPooledEmbeddingSharding)
# What TorchRec's own create_lookup passes for plain tables.
_LOOKUP_TYPES = (
    (RwPooledEmbeddingSharding, ShardingType.ROW_WISE),
    (TwRwPooledEmbeddingSharding, ShardingType.TABLE_ROW_WISE),
    (GridPooledEmbeddingSharding, ShardingType.TABLE_ROW_WISE),
)
