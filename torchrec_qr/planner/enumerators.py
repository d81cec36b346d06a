"""The options of a table, by sharding type, compute kernel and width of shards, each with its costs.

TorchRec lists every shard of an option: W of them for a table whose rows are split, or that is replicated. Here one
entry with a count has the shards of equal cost. So a table has as many entries on a thousand ranks as on eight.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.enumerators import GUARDED_COMPUTE_KERNELS, GUARDED_SHARDING_TYPES_FOR_FP_MODULES
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType, Topology
from torchrec.distributed.types import ShardingType
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from torchrec_qr.distributed.layout import DATA_PARALLEL, ROW_SPLIT, RowCode, block_rows
from torchrec_qr.distributed.sharder import CompositionalSharder
from torchrec_qr.planner.costs import Cost
from torchrec_qr.planner.estimators import Estimator
from torchrec_qr.planner.storage import DENSE, FUSED
from torchrec_qr.planner.tables import PlannedTable

TABLE_WISE = ShardingType.TABLE_WISE.value
COLUMN_WISE = ShardingType.COLUMN_WISE.value
TABLE_COLUMN_WISE = ShardingType.TABLE_COLUMN_WISE.value
ROW_WISE = ShardingType.ROW_WISE.value
TABLE_ROW_WISE = ShardingType.TABLE_ROW_WISE.value
GRID_SHARD = ShardingType.GRID_SHARD.value
COLUMN_SPLIT = frozenset({COLUMN_WISE, TABLE_COLUMN_WISE, GRID_SHARD})
HOSTED = frozenset({TABLE_COLUMN_WISE, TABLE_ROW_WISE, GRID_SHARD})

# The most shards of a table, unless constraints require more, because every rank reads all shards of a plan.
MAX_SHARDS = 64
MIN_COLUMNS = 32


class Scope(Enum):
    """The ranks of a block: one rank, the ranks of one host, or all ranks."""

    RANK = "rank"
    HOST = "host"
    WORLD = "world"


@dataclass(frozen=True, slots=True)
class EqualShards:
    """``count`` consecutive shards of one cost."""

    cost: Cost
    count: int


class Block:
    """Shards that go together to a rank, to a host or to all ranks, with the greatest figures of one shard."""

    __slots__ = ("host_memory", "memory", "scope", "shards", "work_ms")

    def __init__(self, scope: Scope, shards: tuple[EqualShards, ...]) -> None:
        self.scope, self.shards = scope, shards
        self.work_ms = max(equal.cost.work_ms for equal in shards)
        self.memory = max(equal.cost.memory for equal in shards)
        self.host_memory = max(equal.cost.host for equal in shards)

    def total(self, of: Callable[[Cost], float]) -> float:
        """Returns the sum of a figure over all shards."""
        return sum(equal.count * of(equal.cost) for equal in self.shards)


class Option:
    """One way to shard a table.

    Args:
        sharding_type (str): the sharding type.
        kernel (str): the compute kernel.
        width (int): the columns of a shard.
        everywhere (Cost): the cost on every rank, whichever ranks own the shards.
        blocks (tuple[Block, ...]): the shards, in TorchRec's order.
        world_size (int): W.

    Attributes:
        mean_work (float): ms of a rank, on average.
        mean_memory (float): bytes of a rank, on average.
        mean_comms (float): ms of a rank's communication, on average.
        peak_work (float): ms of the largest block that does not go to all ranks.
        peak_memory (float): bytes of the largest block, and of ``everywhere``.
    """

    __slots__ = (
        "blocks",
        "everywhere",
        "kernel",
        "mean_comms",
        "mean_memory",
        "mean_work",
        "peak_memory",
        "peak_work",
        "sharding_type",
        "width",
    )

    def __init__(
        self, sharding_type: str, kernel: str, width: int, everywhere: Cost, blocks: tuple[Block, ...], world_size: int
    ) -> None:
        self.sharding_type, self.kernel, self.width = sharding_type, kernel, width
        self.everywhere, self.blocks = everywhere, blocks
        self.mean_work = everywhere.work_ms + sum(b.total(_work_ms) for b in blocks) / world_size
        self.mean_memory = everywhere.memory + sum(b.total(_memory) for b in blocks) / world_size
        self.mean_comms = sum(b.total(_comms_ms) for b in blocks) / world_size
        uneven = [block for block in blocks if block.scope is not Scope.WORLD]
        self.peak_work = max((block.work_ms for block in uneven), default=0.0)
        self.peak_memory = max((block.memory for block in blocks), default=0.0) + everywhere.memory

    @property
    def on_all_ranks(self) -> bool:
        """True if every rank has shards of the table."""
        return any(block.scope is Scope.WORLD for block in self.blocks)

    def __repr__(self) -> str:
        return f"Option({self.sharding_type}, {self.kernel}, {len(self.blocks)} blocks, {self.mean_work:.4g} ms)"


class Enumerator:
    """Lists the options of a table.

    Args:
        topology (Topology): the hosts and ranks.
        estimator (Estimator): estimates the costs.
        rank_memory (float): a rank's bytes for tables. Tables too large for a host may be split over more ranks.
    """

    def __init__(self, topology: Topology, estimator: Estimator, rank_memory: float) -> None:
        self._topology = topology
        self._estimator = estimator
        self._rank_memory = rank_memory
        # All ranks are one host, or each rank is a host.
        self._hosts_are_alike = topology.intra_group_size in (1, topology.world_size)

    def options(self, table: PlannedTable) -> list[Option]:
        """Returns the options of a table, at least one.

        Raises:
            PlannerError: the constraints allow no option.
            NotImplementedError: compositional tables do not support the optimizer.
        """
        group, device = table.constraints and table.constraints.device_group, self._topology.compute_device
        if group not in (None, device):
            raise PlannerError(
                f"table {table.name!r}: device_group={group!r}; allowed: {device!r}, the device of the ranks",
                PlannerErrorType.STRICT_CONSTRAINTS,
            )
        options = [
            self._option(table, sharding_type, kernel, width)
            for sharding_type in self._sharding_types(table)
            for kernel in self._kernels(table, sharding_type)
            for width in self._widths(table, sharding_type)
        ]
        options = [o for o in options if self._is_allowed_on(table, o)]
        if not options:
            raise PlannerError(self._nothing_left(table), PlannerErrorType.STRICT_CONSTRAINTS)
        return options

    def _sharding_types(self, table: PlannedTable) -> list[str]:
        """Returns what TorchRec's filters allow, without the types that the sharded collection refuses."""
        offered = table.sharder.sharding_types(self._topology.compute_device)
        required = table.constraints.sharding_types if table.constraints else None
        left = [t for t in offered if (t in required if required else self._is_default(table, t))]
        return [t for t in left if self._is_possible(table, t)]

    def _is_default(self, table: PlannedTable, sharding_type: str) -> bool:
        """Returns whether a table without constraints may have a sharding type."""
        has_processors = isinstance(table.module, FeatureProcessedEmbeddingBagCollection)
        if has_processors and sharding_type in GUARDED_SHARDING_TYPES_FOR_FP_MODULES:
            return False
        if sharding_type == GRID_SHARD and table.config is None:
            return False
        if sharding_type == TABLE_COLUMN_WISE or (sharding_type in HOSTED and self._hosts_are_alike):
            return False  # column-wise, row-wise and table-wise cost the same and allow more ranks
        if sharding_type == COLUMN_WISE and not table.is_pooled:
            return False  # TorchRec needs one width for the shards of all tables of a collection
        if sharding_type == ROW_WISE and self._topology.world_size > MAX_SHARDS:
            return self._needs_all_ranks(table)
        return True

    def _needs_all_ranks(self, table: PlannedTable) -> bool:
        """Returns whether a host has too little memory for the table."""
        size = table.rows * table.columns * table.parameter.element_size()
        return size > 0.5 * self._rank_memory * self._topology.intra_group_size

    def _is_possible(self, table: PlannedTable, sharding_type: str) -> bool:
        config = table.config
        if config is None:
            # FBGEMM's dense kernel, which data-parallel tables have, always pools on a CPU.
            return table.is_pooled or sharding_type != DATA_PARALLEL or self._topology.compute_device != "cpu"
        if config.operation == "path" and sharding_type in COLUMN_SPLIT:
            return False
        if sharding_type in ROW_SPLIT:
            try:
                RowCode(config)
            except ValueError:
                return False
        return True

    def _kernels(self, table: PlannedTable, sharding_type: str) -> list[str]:
        device, sharder = self._topology.compute_device, table.sharder
        required = table.constraints.compute_kernels if table.constraints else None
        if isinstance(sharder, CompositionalSharder):
            # Put a plain table of ours into host memory only if constraints require it, because `--fit` compresses it.
            offered = sharder.compute_kernels_of(table.config is not None or not required, sharding_type, device)
        else:
            offered = sharder.compute_kernels(sharding_type, device)
        if required:
            left = [k for k in offered if k in required]
        else:
            left = [k for k in offered if EmbeddingComputeKernel(k) not in GUARDED_COMPUTE_KERNELS]
        if not any(device.storage.ssd > 0 for device in self._topology.devices):
            left = [k for k in left if k != EmbeddingComputeKernel.KEY_VALUE.value]
        if FUSED in left and DENSE in left:
            left.remove(DENSE)
        return left

    def _widths(self, table: PlannedTable, sharding_type: str) -> list[int]:
        """Returns the columns that a shard may have: D, or its halvings down to the least that constraints allow."""
        columns = table.columns
        if sharding_type not in COLUMN_SPLIT:
            return [columns]
        least = table.constraints.min_partition if table.constraints else None
        if not table.is_pooled:
            return [_divisor(columns, least or columns)]
        widths = {_divisor(columns, least)} if least else set()
        width = columns // 2 if sharding_type != GRID_SHARD else columns
        rows = self._topology.intra_group_size if sharding_type == GRID_SHARD else 1
        while width >= (least or MIN_COLUMNS) and width % 4 == 0 and columns // width * rows <= MAX_SHARDS:
            if columns % width == 0:
                widths.add(width)
            width //= 2
        required = table.constraints is not None and table.constraints.sharding_types is not None
        return sorted(widths, reverse=True) or ([columns] if required else [])

    def _option(self, table: PlannedTable, sharding_type: str, kernel: str, width: int) -> Option:
        world = self._topology.world_size

        def shards_from(start: int) -> tuple[EqualShards, ...]:
            def cost(**where: int) -> Cost:
                return self._estimator.shard(table, sharding_type, kernel, columns=(start, start + width), **where)

            if sharding_type not in ROW_SPLIT:
                return (EqualShards(cost(rows=table.rows), world if sharding_type == DATA_PARALLEL else 1),)
            count = world if sharding_type == ROW_WISE else self._topology.intra_group_size
            blocks = equal_row_blocks(table, count)
            return tuple(EqualShards(cost(rows=rows, block=first, num_blocks=count), n) for rows, first, n in blocks)

        starts = range(0, table.columns, width)
        # Estimate each block of columns under concat alone, because there they come from different partitions.
        repeats = 1 if table.config is not None and table.config.operation == "concat" else len(starts)
        shards = [shards_from(start) for start in starts[::repeats]]
        if sharding_type == TABLE_COLUMN_WISE:
            blocks = [Block(Scope.HOST, tuple(EqualShards(s.cost, repeats) for (s,) in shards))]
        else:
            scope = Scope.HOST if sharding_type in HOSTED else Scope.RANK
            scope = Scope.WORLD if sharding_type in (DATA_PARALLEL, ROW_WISE) else scope
            blocks = [Block(scope, of_start) for of_start in shards] * repeats
        everywhere = self._estimator.everywhere(table, sharding_type, kernel)
        return Option(sharding_type, kernel, width, everywhere, tuple(blocks), world)

    def _is_allowed_on(self, table: PlannedTable, option: Option) -> bool:
        """Returns whether an option is possible on the ranks that may own the table."""
        if table.ranks is None:
            return True
        if option.on_all_ranks:
            return len(table.ranks) == self._topology.world_size
        if option.sharding_type in HOSTED:
            return bool(hosts_within(table.ranks, self._topology))
        return True

    def _nothing_left(self, table: PlannedTable) -> str:
        device = self._topology.compute_device
        offered = table.sharder.sharding_types(device)
        text = f"table {table.name!r}: no sharding type is left; its sharder offers {', '.join(offered)} on {device}"
        c = table.constraints
        if c is not None and c.sharding_types:
            text += f"; its constraints allow {', '.join(c.sharding_types)}"
        if c is not None and c.compute_kernels:
            text += f"; by kernels {', '.join(c.compute_kernels)}"
        if c is not None and c.min_partition and c.min_partition > table.columns:
            text += f"; its shards need {c.min_partition} of {table.columns} columns"
        if table.ranks is not None:
            text += f"; on ranks {', '.join(map(str, table.ranks))}"
        if table.config is not None and table.config.operation == "path":
            text += "; operation='path' needs all columns of a row on one rank"
        if table.config is None and not table.is_pooled and device == "cpu":
            text += "; a plain table without pooling cannot be data_parallel on a CPU"
        return text


def equal_row_blocks(table: PlannedTable, num_blocks: int) -> Iterator[tuple[int, int, int]]:
    """Yields (rows, first block, number) of the full row blocks, of the one that is cut short, and of empty ones."""
    if table.config is None:
        total = table.rows
        size = -(-total // num_blocks)
    else:
        total = table.config.bound_partitions.sizes[table.config.base_partition]
        size = block_rows(table.config, num_blocks)
    full, rest = divmod(total, size)
    if full:
        yield size, 0, full
    if rest:
        yield rest, full, 1
    used = full + bool(rest)
    if used < num_blocks:
        yield 0, used, num_blocks - used


def hosts_within(ranks: Sequence[int], topology: Topology) -> list[int]:
    """Returns the hosts all of whose ranks are in ``ranks``."""
    group, allowed = topology.intra_group_size, set(ranks)
    return [
        h
        for h in range(topology.world_size // group)
        if all(rank in allowed for rank in range(h * group, (h + 1) * group))
    ]


_work_ms: Callable[[Cost], float] = attrgetter("work_ms")
_comms_ms: Callable[[Cost], float] = attrgetter("comms_ms")
_memory: Callable[[Cost], float] = attrgetter("memory")


def _divisor(columns: int, least: int) -> int:
    """Returns the least divisor of D that is a multiple of 4 and at least ``least``, as TorchRec does; D if none is."""
    return next((w for w in range(least, columns) if columns % w == 0 and w % 4 == 0), columns)
