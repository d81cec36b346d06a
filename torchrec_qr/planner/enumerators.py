"""The ways in which a table may be placed, each with its costs.

TorchRec lists every shard of every way: W of them for a table that is split by rows or replicated. Here shards that
cost the same are one entry with a count, so that a table has as many entries on a thousand ranks as on eight.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.enumerators import GUARDED_COMPUTE_KERNELS, GUARDED_SHARDING_TYPES_FOR_FP_MODULES
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType, Topology
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import ShardingType
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from torchrec_qr.distributed.layout import DATA_PARALLEL, ROW_SPLIT, RowCode, block_rows
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

# Shards of a table that are made unasked: a plan names each of them, on every rank.
MAX_SHARDS = 64
MIN_COLUMNS = 32


class Scope(Enum):
    """Where the shards of a block go: one to a rank, or one to each rank of a host or of all."""

    RANK = "rank"
    HOST = "host"
    WORLD = "world"


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` shards, one after another, that cost the same."""

    cost: Cost
    count: int


class Block:
    """Shards that are placed together, with the figures of the rank that gets most of them."""

    __slots__ = ("host_memory", "memory", "runs", "scope", "work_ms")

    def __init__(self, scope: Scope, runs: tuple[Run, ...]) -> None:
        self.scope, self.runs = scope, runs
        self.work_ms = max(run.cost.work_ms for run in runs)
        self.memory = max(run.cost.memory for run in runs)
        self.host_memory = max(run.cost.host for run in runs)

    def total(self, of: Callable[[Cost], float]) -> float:
        """Over all shards."""
        return sum(run.count * of(run.cost) for run in self.runs)


class Option:
    """One way of placing a table.

    Args:
        width: columns of a shard.
        everywhere: what every rank bears of it, whoever owns the shards.
        blocks: in TorchRec's order of shards.
        world_size: over which means are taken.
    """

    __slots__ = (
        "blocks",
        "everywhere",
        "kernel",
        "mean_exchange",
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
        self.mean_exchange = sum(b.total(_exchange_ms) for b in blocks) / world_size
        # Of the largest piece that is not spread evenly by itself.
        uneven = [block for block in blocks if block.scope is not Scope.WORLD]
        self.peak_work = max((block.work_ms for block in uneven), default=0.0)
        self.peak_memory = max((block.memory for block in blocks), default=0.0) + everywhere.memory

    @property
    def on_all_ranks(self) -> bool:
        return any(block.scope is Scope.WORLD for block in self.blocks)

    @property
    def is_split_by_rows(self) -> bool:
        return self.sharding_type in ROW_SPLIT

    def __repr__(self) -> str:
        return f"Option({self.sharding_type}, {self.kernel}, {len(self.blocks)} blocks, {self.mean_work:.4g} ms)"


class Enumerator:
    """Lists the options of a table.

    Args:
        topology: hosts and ranks.
        estimator: of costs.
        rank_memory: bytes of a rank that tables may take: what does not fit is split over more ranks than others.
    """

    def __init__(self, topology: Topology, estimator: Estimator, rank_memory: float) -> None:
        self._topology = topology
        self._estimator = estimator
        self._rank_memory = rank_memory
        # One host is all ranks, or one rank is a host.
        self._hosts_are_alike = topology.intra_group_size in (1, topology.world_size)

    def options(self, table: PlannedTable) -> list[Option]:
        """Returns at least one option.

        Raises:
            PlannerError: constraints that leave none.
            NotImplementedError: an optimizer that compositional tables do not have.
        """
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
        """TorchRec's filters, and of compositional tables what their sharder would refuse."""
        offered = table.sharder.sharding_types(self._topology.compute_device)
        asked = table.constraints.sharding_types if table.constraints else None
        left = [t for t in offered if (t in asked if asked else self._is_offered_unasked(table, t))]
        if table.config is not None:
            left = [t for t in left if self._is_possible(table, t)]
        return left

    def _is_offered_unasked(self, table: PlannedTable, sharding_type: str) -> bool:
        has_processors = isinstance(table.module, FeatureProcessedEmbeddingBagCollection)
        if has_processors and sharding_type in GUARDED_SHARDING_TYPES_FOR_FP_MODULES:
            return False
        if sharding_type == GRID_SHARD and table.config is None:
            return False
        if sharding_type == TABLE_COLUMN_WISE or (sharding_type in HOSTED and self._hosts_are_alike):
            return False  # as column-wise, row-wise and table-wise, and less free
        if sharding_type == COLUMN_WISE and not table.is_pooled:
            return False  # TorchRec lays shards of one width side by side, of all tables of a collection
        if sharding_type == ROW_WISE and self._topology.world_size > MAX_SHARDS:
            return self._needs_all_ranks(table)
        return True

    def _needs_all_ranks(self, table: PlannedTable) -> bool:
        """Whether a host has no room for it."""
        size = table.rows * table.columns * table.parameter.element_size()
        return size > 0.5 * self._rank_memory * self._topology.intra_group_size

    def _is_possible(self, table: PlannedTable, sharding_type: str) -> bool:
        config = table.config
        assert config is not None
        if config.operation == "path" and sharding_type in COLUMN_SPLIT:
            return False
        if sharding_type in ROW_SPLIT:
            try:
                RowCode(config)
            except ValueError:
                return False
        return True

    def _kernels(self, table: PlannedTable, sharding_type: str) -> list[str]:
        offered = table.sharder.compute_kernels(sharding_type, self._topology.compute_device)
        asked = table.constraints.compute_kernels if table.constraints else None
        if asked:
            left = [k for k in offered if k in asked]
        else:
            left = [k for k in offered if EmbeddingComputeKernel(k) not in GUARDED_COMPUTE_KERNELS]
        if not any(device.storage.ssd > 0 for device in self._topology.devices):
            left = [k for k in left if k != EmbeddingComputeKernel.KEY_VALUE.value]
        if FUSED in left and DENSE in left:
            left.remove(DENSE)
        return left

    def _widths(self, table: PlannedTable, sharding_type: str) -> list[int]:
        """Columns of a shard: D, or its halvings down to the least that is asked for."""
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
        asked = table.constraints is not None and table.constraints.sharding_types is not None
        return sorted(widths, reverse=True) or ([columns] if asked else [])

    def _option(self, table: PlannedTable, sharding_type: str, kernel: str, width: int) -> Option:
        estimate, world, group = self._estimator.shard, self._topology.world_size, self._topology.intra_group_size
        columns, rows = table.columns, table.rows
        starts = range(0, columns, width)
        # Under concat, shards of other columns hold other partitions.
        same = table.config is None or table.config.operation != "concat"

        def of_columns(start: int, **where: Any) -> Cost:
            return estimate(table, sharding_type, kernel, columns=(start, start + width), **where)

        blocks: list[Block] = []
        if sharding_type == DATA_PARALLEL:
            blocks = [Block(Scope.WORLD, (Run(of_columns(0, rows=rows), world),))]
        elif sharding_type in ROW_SPLIT:
            count = world if sharding_type == ROW_WISE else group
            scope = Scope.WORLD if sharding_type == ROW_WISE else Scope.HOST
            for start in starts[:1] if same else starts:
                runs = tuple(
                    Run(of_columns(start, rows=size, block=first, num_blocks=count), n)
                    for size, first, n in row_runs(table, count)
                )
                blocks.append(Block(scope, runs))
        elif sharding_type == TABLE_COLUMN_WISE:
            costs = [of_columns(start, rows=rows) for start in (starts[:1] if same else starts)]
            runs = (Run(costs[0], len(starts)),) if same else tuple(Run(cost, 1) for cost in costs)
            blocks, same = [Block(Scope.HOST, runs)], False
        else:
            for start in starts[:1] if same else starts:
                blocks.append(Block(Scope.RANK, (Run(of_columns(start, rows=rows), 1),)))
        if same:
            blocks = blocks * len(starts)
        everywhere = self._estimator.everywhere(table, sharding_type, kernel)
        return Option(sharding_type, kernel, width, everywhere, tuple(blocks), world)

    def _is_allowed_on(self, table: PlannedTable, option: Option) -> bool:
        """Whether the ranks to which the table is bound have a place for it."""
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
        text = (
            f"table {table.name!r}: no way of placing it is left; its sharder offers {', '.join(offered)} on {device}"
        )
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
        return text


def row_runs(table: PlannedTable, num_blocks: int) -> Iterator[tuple[int, int, int]]:
    """Rows, first block and number of equal blocks of rows: full ones, one that is cut short, and empty ones."""
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
    """The hosts of which all ranks are among ``ranks``."""
    group, allowed = topology.intra_group_size, set(ranks)
    return [
        h
        for h in range(topology.world_size // group)
        if all(rank in allowed for rank in range(h * group, (h + 1) * group))
    ]


def shard_layout(table: PlannedTable, option: Option, topology: Topology) -> tuple[list[list[int]], list[list[int]]]:
    """Sizes and offsets of the plan's shards, as TorchRec cuts them."""
    sizes, offsets = calculate_shard_sizes_and_offsets(
        tensor=table.parameter,
        world_size=topology.world_size,
        local_world_size=topology.intra_group_size,
        sharding_type=option.sharding_type,
        col_wise_shard_dim=option.width,
    )
    return sizes, offsets


_work_ms: Callable[[Cost], float] = attrgetter("work_ms")
_exchange_ms: Callable[[Cost], float] = attrgetter("exchange_ms")
_memory: Callable[[Cost], float] = attrgetter("memory")


def _divisor(columns: int, least: int) -> int:
    """TorchRec's: the least divisor of D that is a multiple of 4 and at least so large."""
    return next((w for w in range(least, columns) if columns % w == 0 and w % 4 == 0), columns)
