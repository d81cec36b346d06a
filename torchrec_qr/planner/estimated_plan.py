"""A plan for a model, and its estimated costs on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import Topology
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

from torchrec_qr.distributed.layout import DATA_PARALLEL
from torchrec_qr.planner.costs import Cost
from torchrec_qr.planner.enumerators import Option, Scope
from torchrec_qr.planner.table_shards import TableShards
from torchrec_qr.planner.tables import PlannedTable

# The kernels whose rows lie in the memory of the rank's device.
_IN_DEVICE = (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value)
_FIELDS = tuple(Cost.__dataclass_fields__)
_MEMORY = [_FIELDS.index(name) for name in ("parameters", "optimizer", "maps", "buffers")]
_WORK = [_FIELDS.index(name) for name in ("lookup_ms", "comms_ms", "reduce_ms")]


class RankCosts:
    """The sum of costs on every rank, as an array (W, fields of `Cost`)."""

    def __init__(self, world_size: int) -> None:
        self._values = np.zeros((world_size, len(_FIELDS)))
        self._all = np.zeros(len(_FIELDS))

    def add_everywhere(self, cost: Cost) -> None:
        """Adds a cost to every rank."""
        self._all += _row(cost)

    def add(self, rank: int | slice, cost: Cost) -> None:
        """Adds a cost to a rank, or to each of a slice of ranks."""
        self._values[rank] += _row(cost)

    def __repr__(self) -> str:
        return f"RankCosts({len(self)} ranks, balance {self.balance:.4f})"

    def __getitem__(self, rank: int) -> Cost:
        return Cost(*(self._values[rank] + self._all).tolist())

    def __len__(self) -> int:
        return len(self._values)

    @property
    def work_ms(self) -> list[float]:
        """The ms of each rank."""
        return [float(w) for w in (self._values + self._all)[:, _WORK].sum(axis=1)]

    @property
    def memory(self) -> list[float]:
        """The bytes of device memory of each rank."""
        return [float(m) for m in (self._values + self._all)[:, _MEMORY].sum(axis=1)]

    @property
    def balance(self) -> float:
        """The greatest work divided by the mean."""
        work = self.work_ms
        mean = sum(work) / len(work)
        return max(work) / mean if mean else 1.0


@dataclass(frozen=True)
class TablePlan:
    """The option and the ranks of one table.

    Args:
        table (PlannedTable): the table.
        option (Option): the chosen option.
        choices (Sequence[Option]): all options of the table.
        ranks (list[int]): the ranks of its shards, in order. A replicated table has all ranks.
    """

    table: PlannedTable
    option: Option
    choices: Sequence[Option]
    ranks: list[int]

    @property
    def shards(self) -> TableShards:
        """The shards of the table."""
        return TableShards(self.option.sharding_type, self.option.kernel, self.option.width, self.ranks)

    def cost(self, world_size: int) -> Cost:
        """Returns the table's cost on a rank, on average."""
        total = self.option.everywhere
        for block in self.option.blocks:
            for equal in block.shards:
                total = total + equal.cost.times(equal.count / world_size)
        return total

    @property
    def why(self) -> str:
        """The milliseconds of replication against those of communication, and the reason of the choice.

        A table whose rows do not lie in the device's memory has its compute kernel there too.
        """
        tie = f"; on the ranks of {self.table.same_rank_as!r}" if self.table.same_rank_as else ""
        elsewhere = "" if self.option.kernel in _IN_DEVICE else f"; not in the device's memory, by {self.option.kernel}"
        return self._reason + tie + elsewhere

    @property
    def _reason(self) -> str:
        replicated = [o for o in self.choices if o.sharding_type == DATA_PARALLEL]
        sharded = [o for o in self.choices if o.sharding_type != DATA_PARALLEL]
        cheapest = min(sharded, key=lambda o: o.mean_work, default=None)
        if self.option.sharding_type == DATA_PARALLEL:
            text = f"all-reduce {_reduce_ms(self.option):.3g} ms"
            if cheapest is None:
                return f"{text}; nothing else is allowed"
            return f"{text}, {cheapest.sharding_type} all-to-all {cheapest.mean_comms:.3g} ms"
        text = f"all-to-all {self.option.mean_comms:.3g} ms"
        if not replicated:
            return f"{text}; data_parallel is not allowed"
        text += f", all-reduce {_reduce_ms(replicated[0]):.3g} ms"
        if replicated[0].mean_work < self.option.mean_work:
            text += "; on ranks with time to spare"
        elif cheapest is not None and cheapest.peak_work > self.option.peak_work:
            text += f"; pieces of {self.option.peak_work:.3g} ms, {cheapest.sharding_type} {cheapest.peak_work:.3g} ms"
        return text


@dataclass(frozen=True)
class EstimatedPlan:
    """A plan for a model, with its estimated costs.

    Args:
        tables (list[TablePlan]): the tables, in the order of the model.
        topology (Topology): the ranks.
        fixed_ms (float): the ms of a step besides the work of tables: see
            ``torchrec_qr.planner.fixed_costs.FixedCosts``.
        reserved (list[float]): the bytes of each rank that tables may take.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from torchrec_qr.distributed import get_default_sharders
        >>> from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named
        >>> ebc = EmbeddingBagCollection(device=torch.device("meta"), tables=[EmbeddingBagConfig(
        ...     name=f"t{i}", feature_names=[f"f{i}"], num_embeddings=10**6, embedding_dim=128) for i in range(4)])
        >>> planner = CompositionalEmbeddingShardingPlanner(hardware_named("h100").topology(2))
        >>> estimated = planner.propose(ebc, get_default_sharders())
        >>> [table.option.sharding_type for table in estimated.tables], estimated.ranks.balance
        (['table_wise', 'table_wise', 'table_wise', 'table_wise'], 1.0)
    """

    tables: list[TablePlan]
    topology: Topology
    fixed_ms: float
    reserved: list[float]

    def __str__(self) -> str:
        work = self.ranks.work_ms
        lines = [
            f"{len(self.tables)} tables on {len(work)} ranks: {self.step_ms:.3f} ms a step; work {max(work):.3f} ms, "
            f"balance {self.ranks.balance:.3f}; {max(self.ranks.memory) / 2**30:.2f} GiB on the fullest rank"
        ]
        for p in self.tables:
            name = p.table.fqn.removeprefix(".")
            lines.append(f"{name}: {p.option.sharding_type} on ranks {sorted(set(p.ranks))}; {p.why}")
        return "\n".join(lines)

    @cached_property
    def ranks(self) -> RankCosts:
        """The costs of every rank."""
        costs = RankCosts(self.topology.world_size)
        for planned in self.tables:
            costs.add_everywhere(planned.option.everywhere)
            _add_shards(costs, planned)
        return costs

    @property
    def sharded_bytes(self) -> list[float]:
        """The bytes of values and optimizer state of each rank, without data-parallel tables."""
        costs = RankCosts(self.topology.world_size)
        for planned in self.tables:
            if planned.option.sharding_type != DATA_PARALLEL:
                costs.add_everywhere(planned.option.everywhere)
                _add_shards(costs, planned)
        return [costs[rank].parameters + costs[rank].optimizer for rank in range(len(costs))]

    @property
    def step_ms(self) -> float:
        """The milliseconds of a step for embeddings: the greatest work of a rank, and ``fixed_ms``."""
        return max(self.ranks.work_ms) + self.fixed_ms

    def sharding_plan(self) -> ShardingPlan:
        """Returns TorchRec's ``ShardingPlan``, for ``DistributedModelParallel``."""
        modules: dict[str, EmbeddingModuleShardingPlan] = {}
        for planned in self.tables:
            module = modules.setdefault(planned.table.path, EmbeddingModuleShardingPlan())
            module[planned.table.name] = planned.shards.parameter_sharding(planned.table, self.topology)
        return ShardingPlan(dict(modules))


def _add_shards(costs: RankCosts, planned: TablePlan) -> None:
    at = 0
    for block in planned.option.blocks:
        for equal in block.shards:
            if block.scope is Scope.WORLD:
                costs.add(slice(at, at + equal.count), equal.cost)
            else:
                for rank in planned.ranks[at : at + equal.count]:
                    costs.add(rank, equal.cost)
            at += equal.count


def _reduce_ms(option: Option) -> float:
    return option.everywhere.reduce_ms + option.blocks[0].shards[0].cost.reduce_ms


def _row(cost: Cost) -> np.ndarray:
    return np.array([getattr(cost, name) for name in _FIELDS])
