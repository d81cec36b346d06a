"""The bytes and milliseconds of a table's shards under every sharding type.

TorchRec's own estimators estimate plain tables, except optimizer state, which is what FBGEMM and the dense optimizer
hold. Compositional tables follow TorchRec's formulas (``torchrec.distributed.planner.estimator``), with four
differences. An id reads K rows. On a GPU, rows of partitions that fit in the cache cost nothing, and each partition has
a backward of its own. Ranks reduce the replicas beside a split base partition. Memory counts the stored partitions.
A compositional table of one partition that the cache does not hold costs as much as a plain table of its rows.
"""

import math
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.constants import (
    BATCHED_COPY_PERF_FACTOR,
    BIGINT_DTYPE,
    DEFAULT_PERF_ESTIMATOR,
    FULL_BLOCK_EMB_DIM,
    HALF_BLOCK_PENALTY,
    QUARTER_BLOCK_PENALTY,
    WEIGHTED_KERNEL_MULTIPLIER,
    kernel_bw_lookup,
)
from torchrec.distributed.planner.enumerators import get_partition_by_type
from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import (
    CollectiveType,
    ParameterConstraints,
    Perf,
    Shard,
    ShardEstimator,
    ShardingOption,
    Topology,
)
from torchrec.distributed.planner.utils import sharder_name
from torchrec.distributed.types import ShardingType

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.distributed.layout import DATA_PARALLEL, ROW_SPLIT
from torchrec_qr.planner.backward_memory import backward_bytes
from torchrec_qr.planner.costs import NO_COST, Cost
from torchrec_qr.planner.hardware import Hardware, all_reduce_passes
from torchrec_qr.planner.lookup_traffic import backward_traffic, read_partitions
from torchrec_qr.planner.sharder_view import comm_sizes, sharder_view
from torchrec_qr.planner.storage import (
    DENSE,
    FUSED,
    MakeOptimizer,
    OptimizerState,
    Stored,
    class_map_bytes,
    replicated_storage,
    shard_storage,
    value_bytes,
)
from torchrec_qr.planner.tables import PlannedTable

_BY_GROUP = frozenset(t.value for t in (ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD))
_ROW_WISE = ShardingType.ROW_WISE.value
_SCATTERED = frozenset({_ROW_WISE}) | _BY_GROUP
# TorchRec's kernels that keep values outside the device's memory.
_OFFLOADED = frozenset(
    k.value
    for k in EmbeddingComputeKernel
    if k not in (EmbeddingComputeKernel.DENSE, EmbeddingComputeKernel.FUSED, EmbeddingComputeKernel.QUANT)
)


class Estimator:
    """Estimates the costs of shards on the ranks of a topology.

    Args:
        topology (Topology): the bandwidths and numbers of ranks.
        batch_size (int): the samples of a rank.
        hardware (Hardware): the factors of compositional lookups.
        dense_optimizer (MakeOptimizer | None): makes the optimizer of parameters that no fused optimizer steps, such as
            plain data-parallel tables.
        replica_topology (Topology | None): the ranks that reduce data-parallel tables. Default: ``topology``.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        hardware: Hardware,
        dense_optimizer: MakeOptimizer | None = None,
        replica_topology: Topology | None = None,
    ) -> None:
        self.topology = topology
        self.batch_size = batch_size
        self.hardware = hardware
        self._state = OptimizerState(dense_optimizer)
        self._on_cpu = topology.compute_device == "cpu"
        self._fused_bandwidth = memory_bandwidth(topology)
        self._dense_bandwidth = memory_bandwidth(topology, DENSE)
        self._comms: dict[str, tuple[float, float, float, float]] = {}
        self._stock = _TorchRecEstimators(topology, batch_size)
        self._replica_topology = replica_topology or topology
        self._stock_of_replicas = self._stock
        if replica_topology is not None:
            self._stock_of_replicas = _TorchRecEstimators(replica_topology, batch_size)

    def shard(
        self,
        table: PlannedTable,
        sharding_type: str,
        kernel: str,
        *,
        rows: int,
        columns: tuple[int, int],
        block: int = 0,
        num_blocks: int = 1,
    ) -> Cost:
        """Returns the cost of one shard on the rank that owns it, or of a replicated table on each rank.

        Args:
            table (PlannedTable): the table.
            sharding_type (str): the sharding type.
            kernel (str): the compute kernel.
            rows (int): the rows of the shard in the plan, which matter for plain tables.
            columns (tuple[int, int]): [start, stop) of the composed embedding.
            block (int): the number of its row block.
            num_blocks (int): the row blocks of its columns.
        """
        start, stop = columns
        if table.config is None:
            return self._plain(table, sharding_type, kernel, rows, stop - start)
        is_replicated = sharding_type == DATA_PARALLEL
        if is_replicated:
            stored = replicated_storage(table, sharding_type)
        else:
            stored = shard_storage(table, sharding_type, start, stop, block, num_blocks)
        size = value_bytes(stored)
        buffers, lookup_ms, comms_ms = self._work(table, table.config, sharding_type, start, stop)
        return Cost(
            parameters=size,
            optimizer=self._state.of_compositional(table, kernel, stored),
            maps=0 if self._has_map_everywhere(sharding_type) else class_map_bytes(table.config),
            buffers=buffers + (size if is_replicated else 0),
            lookup_ms=lookup_ms,
            comms_ms=comms_ms,
            reduce_ms=self.reduce_ms(stored, self._replica_topology) if is_replicated else 0.0,
        )

    def everywhere(self, table: PlannedTable, sharding_type: str, kernel: str) -> Cost:
        """Returns the cost of a table on every rank besides its shards: replicas beside split rows, and maps."""
        if table.config is None:
            return NO_COST
        maps = class_map_bytes(table.config) if self._has_map_everywhere(sharding_type) else 0
        if sharding_type not in ROW_SPLIT:
            return Cost(maps=maps) if maps else NO_COST
        stored = replicated_storage(table, sharding_type)
        size = value_bytes(stored)
        return Cost(
            parameters=size,
            optimizer=self._state.of_compositional(table, kernel, stored),
            maps=maps,
            buffers=size,
            reduce_ms=self.reduce_ms(stored, self.topology),
        )

    def _has_map_everywhere(self, sharding_type: str) -> bool:
        """Returns whether every rank has the class map: in a process on a CPU, or to encode the ids of split rows."""
        return self._on_cpu or sharding_type in ROW_SPLIT

    def reduce_ms(self, replicas: Stored, topology: Topology) -> float:
        """Returns the milliseconds to all-reduce the gradients of replicas over the ranks of ``topology``, and to apply
        them.
        """
        # A GPU's sums have 4 bytes per value, whatever the replicas store. A CPU's factors are per byte stored.
        size = value_bytes(replicas) if self._on_cpu else 4 * sum(rows * columns for rows, columns, _ in replicas)
        world, local = topology.world_size, topology.local_world_size
        bandwidth = topology.comms_bandwidths.get_bw(local, world, CollectiveType.ALL_REDUCE)
        passes = size * all_reduce_passes(world, local) / bandwidth
        applied = size * self.hardware.replica_factor / self._dense_bandwidth
        return passes + applied + len(replicas) * self.hardware.replica_ms

    def _work(
        self, table: PlannedTable, config: CompositionalConfig, sharding_type: str, start: int, stop: int
    ) -> tuple[float, float, float]:
        """Returns bytes of buffers, ms of lookups and ms of communication of a shard of columns [start, stop)."""
        world, share = self.topology.world_size, self._share(sharding_type)
        per_sample = table.inputs_per_sample
        ids = self.batch_size * sum(per_sample)
        bags = self.batch_size * sum(min(1.0, x) for x in per_sample)
        ranks = 1 if sharding_type == DATA_PARALLEL else world
        looked_up = ids * ranks / share
        rows_out = bags * ranks if table.is_pooled else looked_up
        width = stop - start
        by_columns = sharding_type not in _SCATTERED and sharding_type != DATA_PARALLEL
        forward_size, backward_size = self._comm_sizes(table, sharding_type)

        id_bytes = math.ceil(looked_up * BIGINT_DTYPE)
        ids_in = id_bytes * (2 if table.is_weighted else 1)
        cache_bytes = self.hardware.l2_mib * 2**20
        read = read_partitions(table, share, start, stop, pad=by_columns, cache_bytes=cache_bytes)
        in_memory = [part for part in read if not part.is_cached]
        row_bytes = sum(part.row_bytes for part in in_memory)
        moved = ids_in + looked_up * row_bytes * self.hardware.lookup_factor + rows_out * width * forward_size
        penalty = _narrow_penalty(width) if by_columns else 1.0
        # Use one bandwidth, because one kernel looks up replicas and shards, whatever the plan calls it.
        forward = moved * penalty / self._fused_bandwidth
        if self._on_cpu:
            backward = forward * self.topology.bwd_compute_multiplier
        else:
            # Count each partition in memory as a plain table of its rows, because its rows are summed by themselves.
            columns = sum(part.columns for part in in_memory)
            of_plain = len(in_memory) * ids_in + looked_up * row_bytes + rows_out * columns * forward_size
            beside = backward_traffic(read, looked_up, table.is_weighted, config.operation == "mult")
            backward = of_plain * penalty * self.topology.bwd_compute_multiplier + beside
            backward /= self._fused_bandwidth
        if table.is_weighted:
            backward *= self.topology.weighted_feature_bwd_compute_multiplier
            backward += forward * WEIGHTED_KERNEL_MULTIPLIER

        out = rows_out * width
        buffers = id_bytes + math.ceil(out * table.parameter.element_size())
        if not self._on_cpu:
            buffers += backward_bytes(config, looked_up, start, stop)
        lookup_ms = forward + backward + self.hardware.shard_ms
        if sharding_type == DATA_PARALLEL:
            return buffers, lookup_ms, 0.0
        comms_ms = self._comms_ms(sharding_type, out, bags, width, forward_size, backward_size)
        comms_ms += math.ceil(ids * world * BIGINT_DTYPE) / share / self._bandwidth(CollectiveType.ALL_TO_ALL)
        return buffers, lookup_ms, comms_ms

    def _share(self, sharding_type: str) -> int:
        """Returns the number of row blocks among which ids are divided."""
        if sharding_type in _BY_GROUP:
            return self.topology.intra_group_size
        return self.topology.world_size if sharding_type == _ROW_WISE else 1

    def _comms_ms(
        self, sharding_type: str, out: float, bags: float, width: int, forward_size: float, backward_size: float
    ) -> float:
        """Returns the milliseconds to send embeddings and their gradients."""
        forward, backward = out * forward_size, out * backward_size
        if sharding_type not in _SCATTERED:
            return (forward + backward) / self._bandwidth(CollectiveType.ALL_TO_ALL)
        copied = backward * BATCHED_COPY_PERF_FACTOR / self._fused_bandwidth
        if sharding_type not in _BY_GROUP:
            scattered = forward / self._bandwidth(CollectiveType.REDUCE_SCATTER)
            return scattered + backward / self._bandwidth(CollectiveType.ALL_GATHER) + copied
        topology = self.topology
        group = topology.intra_group_size
        inside = min(group, topology.local_world_size)
        bandwidth = topology.comms_bandwidths.get_bw
        ms = forward / bandwidth(inside, group, CollectiveType.REDUCE_SCATTER)
        ms += backward / bandwidth(inside, group, CollectiveType.ALL_GATHER)
        groups = max(1, topology.world_size // group)
        if groups > 1:
            across = bags * groups * width * (forward_size + backward_size)
            ms += across / bandwidth(1, groups, CollectiveType.ALL_TO_ALL)
        return ms + copied

    def _comm_sizes(self, table: PlannedTable, sharding_type: str) -> tuple[float, float]:
        """Returns the bytes of a value that is sent forward and backward, after the sharder's codecs."""
        if table.fqn not in self._comms:
            option = self._stock.option(table, sharding_type, DENSE, [[table.rows, table.columns]])
            self._comms[table.fqn] = comm_sizes(option, self._stock.sharder(table))
        to_all, back_to_all, scattered, gathered = self._comms[table.fqn]
        if sharding_type in _BY_GROUP or (sharding_type == _ROW_WISE and table.is_pooled):
            return scattered, gathered
        if sharding_type == DATA_PARALLEL:
            return float(table.parameter.element_size()), float(table.parameter.element_size())
        return to_all, back_to_all

    def _bandwidth(self, collective: CollectiveType) -> float:
        topology = self.topology
        return topology.comms_bandwidths.get_bw(topology.local_world_size, topology.world_size, collective)

    def _plain(self, table: PlannedTable, sharding_type: str, kernel: str, rows: int, columns: int) -> Cost:
        is_replicated = sharding_type == DATA_PARALLEL
        stock = self._stock_of_replicas if is_replicated else self._stock
        perf, device_bytes, host_bytes = stock.estimate(table, sharding_type, kernel, rows, columns)
        reduce_ms = perf.bwd_comms if is_replicated else 0.0
        # Add the ids, because TorchRec's total lacks them, and divide them among row blocks, because it does not.
        ids_ms = perf.input_dist_comms / self._share(sharding_type)
        comms_ms = 0.0 if is_replicated else perf.fwd_comms + perf.bwd_comms + ids_ms
        parameters = min(rows * columns * table.parameter.element_size(), device_bytes)
        optimizer = 0 if kernel in _OFFLOADED else self._state.of_plain(table, kernel, rows, columns)
        return Cost(
            parameters=parameters,
            optimizer=optimizer,
            buffers=device_bytes - parameters,
            host=host_bytes,
            lookup_ms=perf.fwd_compute + perf.bwd_compute + perf.prefetch_compute,
            comms_ms=comms_ms,
            reduce_ms=reduce_ms,
        )


class _TorchRecEstimators:
    """TorchRec's own estimators, called once for all shards of one size."""

    def __init__(self, topology: Topology, batch_size: int) -> None:
        self._topology = topology
        self._batch_size = batch_size
        self._sharders: dict[int, Any] = {}
        # The estimators read this dictionary, because TorchRec takes milliseconds to make them on many ranks.
        self._constraints: dict[str, ParameterConstraints] = {}
        self._perf: ShardEstimator = EmbeddingPerfEstimatorFactory.create(
            DEFAULT_PERF_ESTIMATOR, topology=topology, constraints=self._constraints
        )
        self._storage: ShardEstimator = EmbeddingStorageEstimator(topology=topology, constraints=self._constraints)
        self._known: dict[tuple[Any, ...], tuple[Perf, float, float]] = {}

    def estimate(
        self, table: PlannedTable, sharding_type: str, kernel: str, rows: int, columns: int
    ) -> tuple[Perf, float, float]:
        """Returns the time, and the bytes of values, ids and outputs on the device and on the host."""
        constraints = table.constraints or ParameterConstraints()
        key = (
            *(id(table.module), table.parameter.dtype, table.rows, table.columns, table.is_pooled, table.is_weighted),
            *(sharding_type, kernel, rows, columns, hash(constraints)),
        )
        has_processor = constraints.cache_params is not None or hasattr(table.module, "_feature_processor")
        if key in self._known and not has_processor:
            return self._known[key]
        option = self.option(table, sharding_type, kernel, [[rows, columns]])
        self._constraints.clear()
        self._constraints[table.name] = constraints
        sharders: dict[str, Any] = {sharder_name(type(table.module)): self.sharder(table)}
        for estimator in (self._perf, self._storage):
            estimator.estimate([option], sharders)
        (shard,) = option.shards
        assert shard.perf is not None
        assert shard.storage is not None
        on_cpu = self._topology.compute_device == "cpu"
        device, host = (shard.storage.ddr, 0) if on_cpu else (shard.storage.hbm, shard.storage.ddr)
        self._known[key] = shard.perf, float(device), float(host)
        return self._known[key]

    def option(self, table: PlannedTable, sharding_type: str, kernel: str, sizes: list[list[int]]) -> ShardingOption:
        """Returns the object that TorchRec's enumerator makes for an option."""
        constraints = table.constraints or ParameterConstraints()
        parameter: nn.Parameter = table.parameter
        if kernel not in _OFFLOADED and hasattr(parameter, "_optimizer_classes"):
            # Hide the optimizer, because `OptimizerState` counts what it really holds.
            parameter = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
        return ShardingOption(
            name=table.name,
            tensor=parameter,
            module=(table.path, table.module),
            input_lengths=constraints.pooling_factors,
            batch_size=self._batch_size,
            sharding_type=sharding_type,
            partition_by=get_partition_by_type(sharding_type),
            compute_kernel=kernel,
            shards=[Shard(size=size, offset=[0, 0]) for size in sizes],
            cache_params=constraints.cache_params,
            enforce_hbm=constraints.enforce_hbm,
            stochastic_rounding=constraints.stochastic_rounding,
            bounds_check_mode=constraints.bounds_check_mode,
            is_pooled=table.is_pooled,
            feature_names=constraints.feature_names,
            output_dtype=constraints.output_dtype,
            key_value_params=constraints.key_value_params,
        )

    def sharder(self, table: PlannedTable) -> Any:
        """Returns the table's sharder in the form that TorchRec's estimators take."""
        key = id(table.sharder)
        if key not in self._sharders:
            self._sharders[key] = sharder_view(table.sharder)
        return self._sharders[key]


def memory_bandwidth(topology: Topology, kernel: str = FUSED) -> float:
    """Returns the bytes per ms at which a kernel reads a rank's memory, by TorchRec's table of kernels."""
    bandwidth = kernel_bw_lookup(
        topology.compute_device, kernel, topology.hbm_mem_bw, topology.ddr_mem_bw, topology.hbm_to_ddr_mem_bw
    )
    assert bandwidth is not None, "kernels that TorchRec knows on every device"
    return bandwidth


def _narrow_penalty(columns: int) -> float:
    """Returns TorchRec's factor for FBGEMM's kernels on rows that do not fill a block of threads."""
    if columns >= FULL_BLOCK_EMB_DIM:
        return 1.0
    return HALF_BLOCK_PENALTY if columns >= FULL_BLOCK_EMB_DIM // 2 else QUARTER_BLOCK_PENALTY
