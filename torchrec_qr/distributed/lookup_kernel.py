"""The lookup of compositional tables on the ranks that own them.

TorchRec's lookup of a sharding type divides the features among groups of tables. `PooledLookup` and `SequenceLookup`
have a `CompositionalKernel` for each group of compositional tables, and store the replicas.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.types import ShardingEnv2D
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.distributed.copied_rows import CopiedTables, look_up_copies
from torchrec_qr.distributed.customized_kernel import is_fused, layout_of, position_of
from torchrec_qr.distributed.delta_tracker import refuse_tracker
from torchrec_qr.distributed.fused_optimizer import FusedOptimizerHolder, RowOptimizer
from torchrec_qr.distributed.fused_params import update_rule
from torchrec_qr.distributed.global_tensor import ShardGroup
from torchrec_qr.distributed.layout import RowCode, stored_columns
from torchrec_qr.distributed.node_env import Peers
from torchrec_qr.distributed.replication import Replicas, ReplicatedPartitions
from torchrec_qr.distributed.stored_partition import StoredPartition
from torchrec_qr.distributed.two_dimensional import SyncedTables
from torchrec_qr.modules.feature_batch import batch_of
from torchrec_qr.modules.table import table_layout
from torchrec_qr.ops.arguments import DenseGradient, Outcome
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.lookup import stepped_lookup
from torchrec_qr.ops.lookup_warm_up import warm_up
from torchrec_qr.ops.update_rules import Update
from torchrec_qr.partitions.class_map import class_map_on


class LocalShard(nn.Module):
    """One shard of one logical table: the layout of its lookup, its weights, and their optimizer.

    Args:
        table (ShardedEmbeddingTable): TorchRec's description of the shard.
        stored (Sequence[StoredPartition]): the table's partitions on this rank, without replicas.
        optimizer (RowOptimizer | None): their fused optimizer.
        device (torch.device | None): the device of the shard.
    """

    class_map: Tensor | None

    def __init__(
        self,
        table: ShardedEmbeddingTable,
        stored: Sequence[StoredPartition],
        optimizer: RowOptimizer | None,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self._config = config = layout_of(table).config
        self._optimizer, self._position = optimizer, position_of(table)
        self._stored = {p.key: p for p in stored if p.holds(self._position)}
        start = table.local_metadata.shard_offsets[1] if table.local_metadata is not None else 0
        columns = {j: stored_columns(config, j, start, start + table.local_cols) for j in range(config.num_partitions)}
        self._columns = {j: (a, b) for j, (a, b) in columns.items() if a < b}
        # Register no buffer, because DDP sends buffers to all ranks at every forward.
        self.class_map = class_map_on(config.bound_partitions, device)
        self.name = config.name
        splits_rows = layout_of(table).splits_rows
        first_row = layout_of(table).first_row(self._position) if splits_rows else 0
        self.layout = table_layout(
            config,
            {j: b - a for j, (a, b) in self._columns.items()},
            {config.base_partition: first_row},
            len(table.feature_names),
            RowCode(config).layout(first_row) if splits_rows else None,
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "LocalShard":
        super()._apply(fn, recurse)
        if self.class_map is not None:
            self.class_map = class_map_on(self._config.bound_partitions, fn(self.class_map.new_empty(0)).device)
        return self

    def uses(self) -> set[tuple[str, int]]:
        """Returns the partitions, by table and number, that the output depends on."""
        return {(self._config.name, j) for j in self._columns}

    def weights(self, replicas: ReplicatedPartitions) -> list[Tensor]:
        """Returns the shard's columns of the partitions that the output depends on."""
        out = []
        for j, (a, b) in self._columns.items():
            key = self._config.name, j
            if key in self._stored:
                out.append(self._stored[key].piece(self._position))
            else:
                whole = replicas.weights[key]
                # Slice only if columns are fewer, because autograd copies the gradient of a slice.
                out.append(whole if b - a == whole.shape[1] else whole[:, a:b])
        return out

    def is_stored(self) -> list[bool]:
        """Returns per weight whether it is of the shard, and no replica."""
        return [(self._config.name, j) in self._stored for j in self._columns]

    def outcomes(
        self, replicas: ReplicatedPartitions, step: Callable[[RowOptimizer, Tensor], Update | None]
    ) -> list[Outcome]:
        """Returns per weight the update that ``step`` returns for it, or `DenseGradient` without a fused optimizer."""
        out: list[Outcome] = []
        for key in ((self._config.name, j) for j in self._columns):
            if self._optimizer is not None and key in self._stored:
                out.append(step(self._optimizer, self._stored[key].piece(self._position)))
            else:
                out.append(DenseGradient(replicas.touched.get(key)))
        return out


class ShardLookup:
    """The lookup of consecutive shards of a group, with features [first, first + num_features) of its batches.

    Args:
        shards (list[LocalShard]): the shards.
        first (int): the number of the first feature.
        sequence (bool): whether to return an embedding per id.
        peers (Peers | None): the ranks with copies of the same shards, if each node has one.
    """

    def __init__(self, shards: list[LocalShard], first: int, sequence: bool, peers: Peers | None = None) -> None:
        self._shards, self._first, self._sequence, self._peers = shards, first, sequence, peers
        self.num_features = sum(shard.layout.num_features for shard in shards)
        maps = [shard.class_map for shard in shards if shard.class_map is not None]
        self._tables = Description([shard.layout for shard in shards], [shard.name for shard in shards], maps)

    def look_up(self, features: KeyedJaggedTensor, weighted: bool, replicas: ReplicatedPartitions) -> Tensor:
        """Returns (B, ΣD), or without pooling the flattened (N, D) of all features, end to end."""

        def outcomes() -> list[Outcome]:
            return [o for shard in self._shards for o in shard.outcomes(replicas, RowOptimizer.begin_step)]

        if self._peers is not None:
            features.length_per_key()  # for the starts of the features, for which the host waits on a GPU
        batch = batch_of(features, self._first, self.num_features, not self._sequence, weighted)
        weights = self._weights(replicas)
        if self._peers is None:
            return stepped_lookup(self._tables, weights, batch, outcomes)
        is_copied = [is_stored for shard in self._shards for is_stored in shard.is_stored()]
        gradients = [o for shard in self._shards for o in shard.outcomes(replicas, lambda *_: None)]
        return look_up_copies(CopiedTables(self._tables, weights, is_copied, outcomes, gradients), batch, self._peers)

    def warm_up(self, weighted: bool, replicas: ReplicatedPartitions) -> None:
        """Compiles the kernels of a lookup and of its step on a GPU."""
        if self._peers is not None:
            return  # the batch determines its tables
        outcomes = [o for shard in self._shards for o in shard.outcomes(replicas, RowOptimizer.same_step)]
        warm_up(self._tables, self._weights(replicas), outcomes, not self._sequence, weighted)

    def _weights(self, replicas: ReplicatedPartitions) -> list[Tensor]:
        return [weight for shard in self._shards for weight in shard.weights(replicas)]


def shard_lookups(shards: list[LocalShard], sequence: bool, peers: Peers | None = None) -> list[ShardLookup]:
    """Returns the fewest lookups of the shards, in order, that divide tables with kernels from others."""
    out: list[ShardLookup] = []
    first = 0
    for _, group in groupby(shards, key=lambda shard: shard.layout.has_kernels):
        out.append(ShardLookup(list(group), first, sequence, peers))
        first += out[-1].num_features
    return out


def _stored_partitions(tables: list[ShardedEmbeddingTable], device: torch.device | None) -> list[StoredPartition]:
    """Allocates the partitions of a table, without replicas. ``tables`` are its shards on this rank."""
    layout, fused, positions = layout_of(tables[0]), is_fused(tables[0]), [position_of(t) for t in tables]
    numbers = (j for j in range(layout.config.num_partitions) if not layout.is_replicated(j))
    stored = (StoredPartition(layout, j, fused, device, positions) for j in numbers)
    return [partition for partition in stored if any(map(partition.holds, positions))]


class CompositionalKernel(BaseEmbedding):
    """Looks up a group of compositional shards: maps ids to rows, composes them, and pools unless ``sequence``.

    The kernel stores the partitions, without replicas. The backward steps the rows of fused ones. The others are
    parameters for a dense optimizer.

    Args:
        config (GroupedEmbeddingConfig): TorchRec's description of the group.
        pg (dist.ProcessGroup | None): the ranks.
        device (torch.device | None): the device of the partitions.
        sequence (bool): whether to return an embedding per id.
        peers (Peers | None): the ranks with copies of the same shards, if each node has one.
    """

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        sequence: bool,
        peers: Peers | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._sequence, self._peers = sequence, peers
        # The lookup sets them before every forward.
        self.replicas = ReplicatedPartitions({}, {})
        self.partitions: list[StoredPartition] = []
        optimizers: dict[str, RowOptimizer] = {}
        # Sort by name, because the shards of a table, whose partitions have one storage each, may be apart.
        of_name = attrgetter("name")
        for name, group in groupby(sorted(config.embedding_tables, key=of_name), key=of_name):
            tables = list(group)
            stored = _stored_partitions(tables, device)
            self.partitions += stored
            if stored and is_fused(tables[0]):
                rule = update_rule(name, tables[0].fused_params or {})
                optimizers[name] = RowOptimizer(stored, rule, ShardGroup.of_table(tables[0], pg))
        self._shards = nn.ModuleList(
            LocalShard(t, [p for p in self.partitions if p.key[0] == t.name], optimizers.get(t.name), device)
            for t in config.embedding_tables
        )
        self._shard_lookups = shard_lookups(list(self._local_shards()), sequence, peers)
        self.optimizers = nn.ModuleList(FusedOptimizerHolder(optimizer) for optimizer in optimizers.values())
        self.dense = nn.ParameterList(p.weight for p in self.partitions if not p.leaves)

    @property
    def config(self) -> GroupedEmbeddingConfig:
        return self._config

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Returns (B, ΣD) of the group's features, or without pooling their flattened (N, D), end to end."""
        weighted = self._config.is_weighted
        outputs = [lookup.look_up(features, weighted, self.replicas) for lookup in self._shard_lookups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=0 if self._sequence else 1)

    def warm_up(self, replicas: ReplicatedPartitions) -> None:
        """Compiles the kernels of a step on a GPU."""
        for lookup in self._shard_lookups:
            lookup.warm_up(self._config.is_weighted, replicas)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "CompositionalKernel":
        super()._apply(fn, recurse)
        # Make the lookups anew, because class maps may be on another device.
        self._shard_lookups = shard_lookups(list(self._local_shards()), self._sequence, self._peers)
        return self

    def uses(self) -> set[tuple[str, int]]:
        """Returns the partitions, by table and number, that the output depends on."""
        return {key for shard in self._local_shards() for key in shard.uses()}

    def _local_shards(self) -> Iterator[LocalShard]:
        return (shard for shard in self._shards if isinstance(shard, LocalShard))

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Returns nothing, because TorchRec requires a table of each name. The collection has the parameters."""
        return iter(())

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """Returns nothing: see `named_parameters_by_table`."""
        return {} if destination is None else destination

    def flush(self) -> None:
        """Does nothing. TorchRec calls this before a checkpoint, and there is no cache."""

    def purge(self) -> None:
        """Does nothing. TorchRec calls this before loading, and there is no cache."""


class _CompositionalLookup:
    """A mixin of TorchRec's lookups, with a `CompositionalKernel` for each group of compositional tables.

    Args:
        tables (list[ShardedEmbeddingTable]): the compositional tables of a sharding type on all ranks, each once.
        is_data_parallel (bool): whether the sharding type is data-parallel.
        device (torch.device | None): the device of the parameters.
        peers (Peers | None): the ranks with copies of the same shards, if each node has one.
        kwargs (Any): arguments of TorchRec's lookup.
    """

    _sequence: bool
    _emb_modules: nn.ModuleList
    _replicated: nn.Module

    def __init__(
        self,
        tables: list[ShardedEmbeddingTable],
        is_data_parallel: bool,
        device: torch.device | None,
        peers: Peers | None,
        **kwargs: Any,
    ) -> None:
        # Set the peers first, because TorchRec's constructor makes the kernels.
        self.peers = peers
        super().__init__(device=device, **kwargs)  # type: ignore[call-arg]
        self.is_data_parallel = is_data_parallel
        self._compositional = [table.name for table in tables]
        self._replicated = Replicas(tables, device)
        used = {key for kernel in self.kernels() for key in kernel.uses()}
        if isinstance(kwargs["env"], ShardingEnv2D) and not is_data_parallel and self._compositional:
            holders = chain(self._replicas().optimizers, *(kernel.optimizers for kernel in self.kernels()))
            optimizers = [holder.fused_optimizer for holder in holders if isinstance(holder, FusedOptimizerHolder)]
            self.synced = SyncedTables(list(self.partitions()), optimizers)
        self._unused = [i for i, key in enumerate(self._replicas().parameters_of) if key not in used]

    def kernels(self) -> Iterator[CompositionalKernel]:
        """Yields the kernel of each group of compositional tables."""
        return (m for m in self._emb_modules if isinstance(m, CompositionalKernel))

    def partitions(self) -> Iterator[StoredPartition]:
        """Yields the partitions of which this rank stores rows."""
        for kernel in self.kernels():
            yield from kernel.partitions
        yield from self._replicas().partitions

    def replicate(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Wraps the replicas of this lookup in DDP, if there are any."""
        if self._replicas().parameters_of and not isinstance(self._replicated, DistributedDataParallel):
            self._replicated = wrap(self._replicated)

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        weights: list[Tensor] = self._replicated() if self._replicas().parameters_of else []
        by_partition = dict(zip(self._replicas().parameters_of, weights, strict=True))
        for kernel in self.kernels():
            kernel.replicas = ReplicatedPartitions(by_partition, self._replicas().touched_of)
        out: Tensor = super().forward(sparse_features)  # type: ignore[misc]
        for i in self._unused:
            # Use the replicas of tables of which this rank owns no rows, because DDP waits for every gradient.
            out = out + weights[i][:0].sum()
        return out

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compiles the kernels of a step on a GPU: see `torchrec_qr.distributed.warm_up`."""
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

    def register_optim_state_tracker_fn(self, record_fn: Callable[..., None]) -> None:
        """Registers a function of TorchRec's ``ModelDeltaTracker``, if no table is compositional."""
        refuse_tracker(self._compositional)
        super().register_optim_state_tracker_fn(record_fn)  # type: ignore[misc]

    def _create_embedding_kernel(self, config: GroupedEmbeddingConfig, *args: Any, **kwargs: Any) -> BaseEmbedding:
        if config.compute_kernel != EmbeddingComputeKernel.CUSTOMIZED_KERNEL:
            kernel: BaseEmbedding = super()._create_embedding_kernel(config, *args, **kwargs)  # type: ignore[misc]
            return kernel
        # Find these by type, because TorchRec's two lookups pass them in different orders.
        pg = next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
        device = next((a for a in args if isinstance(a, torch.device)), None)
        return CompositionalKernel(config, pg, device, self._sequence, self.peers)

    def _replicas(self) -> Replicas:
        module = self._replicated
        replicas = module.module if isinstance(module, DistributedDataParallel) else module
        assert isinstance(replicas, Replicas)
        return replicas


class PooledLookup(_CompositionalLookup, GroupedPooledEmbeddingsLookup):
    """The lookup of a sharding type with pooling."""

    _sequence = False


class SequenceLookup(_CompositionalLookup, GroupedEmbeddingsLookup):
    """The lookup of a sharding type without pooling."""

    _sequence = True


def own_lookup(lookup: nn.Module) -> PooledLookup | SequenceLookup:
    """Returns a lookup of a sharded collection without its ``DistributedDataParallel`` wrapper."""
    inner = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
    assert isinstance(inner, PooledLookup | SequenceLookup)
    return inner
