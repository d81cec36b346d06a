"""TorchRec's managed collisions (ZCH) in front of a sharded collection with compositional tables.

Raw ids travel to ranks by value, and each rank gives them slots of its own. TorchRec cuts the slots of a table where
its rows are cut. A compositional table has S slots, which are its ids: the slots of a rank are the ids whose base row
it owns, in ascending order. Nothing is reset when a slot is evicted, because the rows belong to other ids too.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.distributed.embedding_types import KJTList, ShardedEmbeddingTable
from torchrec.distributed.mc_embedding import (
    ManagedCollisionEmbeddingCollectionContext,
    ShardedManagedCollisionEmbeddingCollection,
)
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionContext,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.distributed.mc_modules import ShardedManagedCollisionCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import ManagedCollisionCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.configs import CompositionalConfig, is_compositional
from torchrec_qr.distributed.customized_kernel import layout_or_none
from torchrec_qr.distributed.embedding import SequenceContext
from torchrec_qr.distributed.embeddingbag import CompositionalContext, ShardedCompositionalEmbeddingBagCollection
from torchrec_qr.distributed.layout import RowCode, block_rows
from torchrec_qr.distributed.lookup_kernel import CompositionalKernel, own_lookup
from torchrec_qr.distributed.sharder import CompositionalSharder
from torchrec_qr.partitions import ClosedForm


class SlotBlock(NamedTuple):
    """The slots of a table on a rank: its ids whose base row is in [first_row, first_row + rows), in ascending order.

    With stride M and size r of the base partition, slot s of the block is the id

        M · (first_row + r · (s // (M · rows))) + s % (M · rows)

    Args:
        config (CompositionalConfig): the table, whose partitions have a closed form.
        first_row (int): the first base row.
        rows (int): the base rows.
    """

    config: CompositionalConfig
    first_row: int
    rows: int

    @property
    def num_slots(self) -> int:
        """The number of ids below S."""
        stride, size = self._base
        groups, rest = divmod(self.config.num_embeddings, stride * size)
        return groups * stride * self.rows + min(max(rest - stride * self.first_row, 0), stride * self.rows)

    def codes_of(self, slots: Tensor) -> Tensor:
        """Returns the row codes (N,) of slots (N,), less those of the rows before the block."""
        stride, _ = self._base
        group, within = slots // (stride * self.rows), slots % (stride * self.rows)
        return within // stride * RowCode(self.config).codes_per_row + within % stride + stride * group

    def ids_of(self, codes: Tensor) -> Tensor:
        """Returns the ids (N,) of what `codes_of` returns.

        Example:
            >>> import torch
            >>> from torchrec_qr import CompositionalEmbeddingBagConfig, QuotientRemainder
            >>> config = CompositionalEmbeddingBagConfig(
            ...     name="t", feature_names=["f"], num_embeddings=10, embedding_dim=4,
            ...     partitions=QuotientRemainder(num_collisions=3))  # four base rows: id % 4
            >>> block = SlotBlock(config, first_row=2, rows=2)
            >>> block.num_slots, block.ids_of(block.codes_of(torch.arange(4))).tolist()
            (4, [2, 3, 6, 7])
        """
        return RowCode(self.config).layout(self.first_row).ids_of(codes)

    @property
    def _base(self) -> tuple[int, int]:
        p = self.config.bound_partitions
        assert isinstance(p, ClosedForm), "refused by `_check`"
        return p.strides[self.config.base_partition], p.sizes[self.config.base_partition]


def slot_blocks(config: CompositionalConfig, num_ranks: int) -> list[SlotBlock]:
    """Returns the blocks of all ranks.

    Args:
        config (CompositionalConfig): the table.
        num_ranks (int): W.
    """
    most, all_rows = block_rows(config, num_ranks), config.bound_partitions.sizes[config.base_partition]
    starts = [min(rank * most, all_rows) for rank in range(num_ranks + 1)]
    return [SlotBlock(config, start, stop - start) for start, stop in pairwise(starts)]


class ShardedSlots(ShardedManagedCollisionCollection):
    """TorchRec's sharded managed collisions, whose slots of compositional tables are row codes for the lookup.

    Args:
        module (ManagedCollisionCollection): the managed collisions.
        plan (dict[str, ParameterSharding]): the plan of the tables.
        env (ShardingEnv): the ranks.
        device (torch.device): the device of this rank.
        embedding_shardings (list[Any]): the sharding types of the collection, all row-wise.
    """

    def __init__(
        self,
        module: ManagedCollisionCollection,
        plan: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device,
        embedding_shardings: list[Any],
    ) -> None:
        self._blocks = {
            table.name: _blocks_of(sharding, layout.config)[sharding._rank]
            for sharding in embedding_shardings
            for table in _tables_of(sharding)
            if (layout := layout_or_none(table)) is not None
        }
        super().__init__(module, plan, env, device, list(map(_in_slots, embedding_shardings)))

    def compute(self, ctx: Any, dist_input: KJTList) -> KJTList:
        return self._mapped(super().compute(ctx, dist_input), lambda block, slots, _: block.codes_of(slots))

    def output_dist(self, ctx: Any, output: KJTList) -> Any:
        """Returns the ids of the slots, like TorchRec's class. ``output`` are the codes."""
        return super().output_dist(ctx, self._mapped(output, lambda block, codes, first: block.ids_of(codes) - first))

    def evict(self) -> dict[str, Tensor | None]:
        """Returns the slots of plain tables that TorchRec resets. No slot of a compositional table is reset."""
        evictions: dict[str, Tensor | None] = super().evict()
        return {table: None if table in self._blocks else slots for table, slots in evictions.items()}

    def _mapped(self, features: KJTList, mapped: Callable[[SlotBlock, Tensor, int], Tensor]) -> KJTList:
        """Returns features with other values for compositional tables, of which each has a block and a first slot."""
        out = []
        for kjt, tables, splits in zip(
            features, self._sharding_tables, self._sharding_per_table_feature_splits, strict=True
        ):
            parts = [part.values() for part in kjt.split(splits)]
            values = [
                mapped(self._blocks[table], part, self._table_to_offset[table]) if table in self._blocks else part
                for table, part in zip(tables, parts, strict=True)
            ]
            out.append(
                KeyedJaggedTensor(
                    keys=kjt.keys(),
                    values=torch.cat(values),
                    weights=kjt.weights_or_none(),
                    lengths=kjt.lengths(),
                    stride=kjt.stride(),
                )
            )
        return KJTList(out)


def _tables_of(sharding: Any) -> list[ShardedEmbeddingTable]:
    return [table for group in sharding._grouped_embedding_configs for table in group.embedding_tables]


def _blocks_of(sharding: Any, config: CompositionalConfig) -> list[SlotBlock]:
    return slot_blocks(config, len(sharding._grouped_embedding_configs_per_rank))


def _in_slots(sharding: Any) -> Any:
    """Returns a copy of a sharding type whose compositional tables have S rows, cut at the slots of the ranks."""

    def table_in_slots(table: ShardedEmbeddingTable, rank: int) -> ShardedEmbeddingTable:
        layout = layout_or_none(table)
        if layout is None:
            return table
        sizes = [block.num_slots for block in _blocks_of(sharding, layout.config)]
        starts = list(accumulate(sizes, initial=0))
        assert table.global_metadata is not None
        everywhere = copy.copy(table.global_metadata)
        everywhere.shards_metadata = [
            ShardMetadata([start, 0], [size, table.local_cols], shard.placement)
            for start, size, shard in zip(starts, sizes, table.global_metadata.shards_metadata, strict=False)
        ]
        return replace(
            table,
            num_embeddings=layout.config.num_embeddings,
            local_metadata=everywhere.shards_metadata[rank],
            global_metadata=everywhere,
        )

    out = copy.copy(sharding)
    out._grouped_embedding_configs_per_rank = [
        [replace(group, embedding_tables=[table_in_slots(t, rank) for t in group.embedding_tables]) for group in groups]
        for rank, groups in enumerate(sharding._grouped_embedding_configs_per_rank)
    ]
    out._grouped_embedding_configs = out._grouped_embedding_configs_per_rank[sharding._rank]
    return out


@dataclass
class _BagContext(ManagedCollisionEmbeddingBagCollectionContext, CompositionalContext):
    """The context of both classes."""


class _SequenceContext(ManagedCollisionEmbeddingCollectionContext, SequenceContext):
    """The context of both classes."""


class _ManagedCollisions(BaseShardedManagedCollisionEmbeddingCollection[Any]):
    """A mixin of TorchRec's two sharded modules, for a collection of ours inside.

    Args:
        module (BaseManagedCollisionEmbeddingCollection): the module.
        plan (dict[str, ParameterSharding]): the plan of its tables, all row-wise.
        sharder (CompositionalSharder[Any]): the sharder of the collection inside.
        env (ShardingEnv): the ranks.
        device (torch.device): the device of this rank.

    Raises:
        NotImplementedError, ValueError: see `_check`.
    """

    def __init__(
        self,
        module: BaseManagedCollisionEmbeddingCollection,
        plan: dict[str, ParameterSharding],
        sharder: CompositionalSharder[Any],
        env: ShardingEnv,
        device: torch.device,
    ) -> None:
        # Pass over TorchRec's own constructor, because it asserts its own classes.
        super(BaseShardedManagedCollisionEmbeddingCollection, self).__init__()
        inside: Any = module._embedding_module
        _check(module._managed_collision_collection, inside.embedding_configs(), plan, env.world_size)
        self._device, self._env = device, env
        sharded = sharder.shard(inside, plan, env, device)
        # The ids come from the managed collisions, which have the input dist.
        sharded._has_uninitialized_input_dist = False
        self._embedding_module = sharded
        self.bagged = isinstance(sharded, ShardedCompositionalEmbeddingBagCollection)
        shardings = sharded._embedding_shardings if self.bagged else sharded._sharding_type_to_sharding.values()
        self._managed_collision_collection = ShardedSlots(
            module._managed_collision_collection, plan, env, device, list(shardings)
        )
        self._free_features_storage_early = False
        self._return_remapped_features = module._return_remapped_features
        self._allow_in_place_embed_weight_update = module._allow_in_place_embed_weight_update
        lookups: list[Any] = list(map(own_lookup, sharded._lookups))
        # The tables whose rows TorchRec resets.
        self._table_to_tbe_and_index = {
            table.name: (kernel._emb_module, torch.tensor([i], dtype=torch.int, device=device))
            for lookup in lookups
            for kernel in lookup._emb_modules
            if not isinstance(kernel, CompositionalKernel)
            for i, table in enumerate(kernel.config.embedding_tables)
        }
        self._buffer_ids = torch.tensor([0], dtype=torch.int, device=device)


class ShardedManagedCollisionBags(_ManagedCollisions, ShardedManagedCollisionEmbeddingBagCollection):
    """TorchRec's ``ShardedManagedCollisionEmbeddingBagCollection`` with a collection of ours inside."""

    def create_context(self) -> _BagContext:
        return _BagContext(sharding_contexts=[])

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        inside: Any = self._embedding_module
        features = inside.prepared(ctx, _with_raw_ids(inside, features))
        if ctx.bags is not None and self._return_remapped_features:
            raise NotImplementedError(
                f"features {features.keys()}: inverse indices with return_remapped_features=True are not supported by "
                "sharded managed collisions; allowed: one of them"
            )
        return super().input_dist(ctx, features)


class ShardedManagedCollisionSequences(_ManagedCollisions, ShardedManagedCollisionEmbeddingCollection):
    """TorchRec's ``ShardedManagedCollisionEmbeddingCollection`` with a collection of ours inside."""

    def create_context(self) -> _SequenceContext:
        return _SequenceContext(sharding_contexts=[])

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        inside: Any = self._embedding_module
        return super().input_dist(ctx, inside.prepared(ctx, _with_raw_ids(inside, features)))


def _with_raw_ids(inside: Any, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Returns a batch if its ids are int64, because TorchRec writes them into slots of int64.

    Raises:
        TypeError: the ids have another type.
    """
    if (given := features.values().dtype) != torch.int64:
        tables = [config.name for config in inside._configs]
        raise TypeError(
            f"tables {tables}, features {features.keys()}: ids have dtype {given}; allowed with managed collisions: "
            "torch.int64"
        )
    return features


def _check(
    collisions: ManagedCollisionCollection,
    configs: Sequence[Any],
    plan: Mapping[str, ParameterSharding],
    num_ranks: int,
) -> None:
    """Raises on every rank if a table cannot have managed collisions.

    Raises:
        NotImplementedError: a table is not row-wise, or a compositional one hashes its ids, or has partitions without
            a closed form.
        ValueError: a compositional table has no ids for one of the ranks, or the slots of a rank end within a bucket
            of TorchRec's MPZCH.
    """
    for config in configs:
        if (kind := plan[config.name].sharding_type) != ShardingType.ROW_WISE.value:
            raise NotImplementedError(
                f"table {config.name!r}: managed collisions of a {kind} table are not supported; allowed: row_wise, or "
                'id_hash="splitmix64" in place of managed collisions, under every sharding type'
            )
        if not is_compositional(config):
            continue
        if config.id_hash is not None:
            raise NotImplementedError(
                f"table {config.name!r}: id_hash={config.id_hash!r} behind sharded managed collisions is not "
                "supported, because the slot itself gives its rank; allowed: either of the two"
            )
        if not isinstance(config.bound_partitions, ClosedForm):
            raise NotImplementedError(
                f"table {config.name!r}: managed collisions of {type(config.partitions).__name__} are not supported if "
                "the module is sharded; allowed: partitions of closed form, such as QuotientRemainder"
            )
        sizes = [block.num_slots for block in slot_blocks(config, num_ranks)]
        if not all(sizes):
            raise ValueError(
                f"table {config.name!r}: its base partition has {config.bound_partitions.sizes[config.base_partition]} "
                f"rows, which give {num_ranks} ranks {sizes} slots; allowed: slots on every rank, so fewer ranks or "
                "more rows"
            )
        of_table = collisions._managed_collision_modules[config.name]
        ends = list(accumulate(sizes))
        if isinstance(of_table, HashZchManagedCollisionModule) and not set(ends) <= set(of_table._output_segments):
            raise ValueError(
                f"table {config.name!r}: the slots of the ranks end at {ends}, and the buckets of its "
                f"HashZchManagedCollisionModule at {of_table._output_segments[1:]}; allowed: ranks that end with a "
                "bucket, such as by base rows that the ranks divide, each of as many ids"
            )
