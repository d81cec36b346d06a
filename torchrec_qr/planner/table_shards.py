"""The shards of one table in a plan, as TorchRec's ``ParameterSharding``."""

from dataclasses import dataclass

from torchrec.distributed.planner.types import PlannerError, Topology
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.sharding_plan import placement as device_of
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingType, ShardMetadata

from torchrec_qr.distributed.layout import DATA_PARALLEL
from torchrec_qr.planner.error_kinds import WRONG_INPUT
from torchrec_qr.planner.tables import PlannedTable

_OF_CONSTRAINTS = (
    *("cache_params", "enforce_hbm", "stochastic_rounding", "bounds_check_mode"),
    *("output_dtype", "key_value_params"),
)


@dataclass(frozen=True)
class TableShards:
    """The sharding type, the kernel and the ranks of a table.

    Args:
        sharding_type (str): the sharding type.
        kernel (str): the compute kernel.
        columns (int): the columns of a shard.
        ranks (list[int]): the ranks of its shards, in order. A replicated table has all ranks.
    """

    sharding_type: str
    kernel: str
    columns: int
    ranks: list[int]

    def parameter_sharding(self, table: PlannedTable, topology: Topology) -> ParameterSharding:
        """Returns TorchRec's entry of a plan for the table.

        Args:
            table (PlannedTable): the table.
            topology (Topology): the ranks.

        Raises:
            PlannerError: a rank that the topology lacks, another number of ranks than of shards, or rows on other ranks
                than those on which TorchRec looks them up.
        """
        world = topology.world_size
        for rank in (min(self.ranks, default=0), max(self.ranks, default=0)):
            if not 0 <= rank < world:
                raise PlannerError(f"table {table.name!r}: rank {rank}; allowed: 0..{world - 1}", WRONG_INPUT)
        spec, ranks, num_shards = None, self.ranks, world
        if self.sharding_type != DATA_PARALLEL:
            sizes, offsets = calculate_shard_sizes_and_offsets(
                table.parameter,
                world,
                topology.intra_group_size,
                self.sharding_type,
                col_wise_shard_dim=self.columns,
            )
            num_shards = len(sizes)
        if len(ranks) != num_shards:
            raise PlannerError(
                f"table {table.name!r}: {len(ranks)} ranks; allowed: {num_shards}, one for each shard of "
                f"{self.sharding_type} in shards of {self.columns} columns",
                WRONG_INPUT,
            )
        self._check_order(table, world, topology.intra_group_size)
        if self.sharding_type != DATA_PARALLEL:
            ranks = list(ranks)
            devices = [device_of(topology.compute_device, rank, topology.local_world_size) for rank in ranks]
            spec = EnumerableShardingSpec(
                [
                    ShardMetadata(shard_sizes=size, shard_offsets=offset, placement=device)
                    for size, offset, device in zip(sizes, offsets, devices, strict=True)
                ]
            )
        sharding = ParameterSharding(
            sharding_type=self.sharding_type, compute_kernel=self.kernel, ranks=ranks, sharding_spec=spec
        )
        if table.constraints is not None:
            for name in _OF_CONSTRAINTS:
                setattr(sharding, name, getattr(table.constraints, name))
        return sharding

    def _check_order(self, table: PlannedTable, world: int, group: int) -> None:
        """Checks that replicas and row blocks lie in order on all ranks, or on those of a node."""
        if self.sharding_type in (DATA_PARALLEL, ShardingType.ROW_WISE.value):
            size, allowed = world, f"0..{world - 1}"
        elif self.sharding_type in (ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value):
            size, allowed = group, f"the {group} of a node for each block of columns"
        else:
            return
        blocks = [self.ranks[i : i + size] for i in range(0, len(self.ranks), size)]
        if any(block != list(range(block[0], block[0] + size)) or block[0] % size for block in blocks):
            raise PlannerError(
                f"table {table.name!r}: ranks {self.ranks} of {self.sharding_type}; allowed: {allowed}, in order",
                WRONG_INPUT,
            )
