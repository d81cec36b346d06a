"""The planner of plain and compositional tables, which balances work."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    StorageReservation,
    Topology,
)
from torchrec.distributed.types import EnumerableShardingSpec, ModuleSharder, ShardingPlan, ShardingPlanner
from torchrec.distributed.utils import get_device_type

from torchrec_qr.distributed import get_default_sharders
from torchrec_qr.distributed.layout import DATA_PARALLEL, num_row_blocks
from torchrec_qr.planner.enumerators import Enumerator, Option, Scope
from torchrec_qr.planner.error_kinds import NOT_IN_PLAN
from torchrec_qr.planner.estimated_plan import EstimatedPlan, RankCosts, TablePlan
from torchrec_qr.planner.estimators import Estimator
from torchrec_qr.planner.fit_advice import Infeasible
from torchrec_qr.planner.fixed_costs import FixedCosts
from torchrec_qr.planner.hardware import GIB, HARDWARE, Hardware, hardware_of
from torchrec_qr.planner.partitioner import Cluster, Misfit, Packing
from torchrec_qr.planner.proposer import Proposal, Search, most_frugal
from torchrec_qr.planner.rank_ties import RankTies
from torchrec_qr.planner.storage import MakeOptimizer
from torchrec_qr.planner.tables import PlannedTable, find_tables

_RESERVED = 0.15
# Ranks are even up to this ratio of greatest to mean work. A larger ratio counts to this power.
_EVEN = 1.05
_EVENNESS = 3

# Arguments of TorchRec's planner that have no meaning here, and what to use instead.
_INSTEAD = {
    "enumerator": "this planner lists options of its own, which constraints narrow (sharding_types, compute_kernels)",
    "proposer": "this planner searches by itself; `constraints` and `ranks` narrow the search",
    "partitioner": "this planner assigns shards to ranks by itself; `ranks` narrows the ranks of a table",
    "performance_model": "estimates follow `topology` and `hardware`",
    "stats": "`propose` returns all estimates, and debug=True logs them",
    "callbacks": "change the plan that `plan` returns; `estimate` returns its cost",
    "timeout_seconds": "the search ends after a number of trials",
    "plan_loader": "pass a stored plan to DistributedModelParallel instead of a planner",
}
_LOG = logging.getLogger(__name__)


class CompositionalEmbeddingShardingPlanner(ShardingPlanner):
    """Plans plain and compositional tables, in place of TorchRec's ``EmbeddingShardingPlanner``.

    Among the plans that fit, the planner searches for the least

        max over ranks of  Σ over tables of  (lookup_ms + comms_ms + reduce_ms)

    in estimated milliseconds of a step: see `torchrec_qr.planner.costs.Cost`. Each table may have every sharding type
    of its sharder. TorchRec's formulas estimate a plain table. A compositional table stores Σ_j |P_j| · D_j values and
    their optimizer's state, and every rank stores its replicas. An id reads K rows, and one row per bag is sent,
    whatever K.

    Args:
        topology (Topology | None): the ranks. Default: those of the process group, on this device.
        batch_size (int | None): the samples of a rank. Default: TorchRec's, 512.
        storage_reservation (StorageReservation | None): the memory without tables. Default: 15 % of each rank.
        constraints (Mapping[str, ParameterConstraints] | None): TorchRec's constraints, by table.
        debug (bool): whether to log the work of each rank, and the sharding type of each table with its reason.
        ranks (Mapping[str, Sequence[int]] | None): the ranks that may own a table's shards, by table.
        same_rank_as (Mapping[str, str] | None): for a table, the table whose ranks it takes. Both take one sharding
            type and equally many shards, and shard i of one lies on the rank of shard i of the other.
        hardware (Hardware | None): cost factors that a topology lacks. Default: those of the topology's device.
        dense_optimizer (MakeOptimizer | None): makes the optimizer of parameters that no fused optimizer steps, such as
            plain data-parallel tables. Default: SGD, which has no state.
        replica_topology (Topology | None): the ranks that reduce data-parallel tables. Default: ``topology``.
            Under TorchRec's ``DMPCollection`` these are all ranks, and ``topology`` has the ranks of one group.
        of_torchrec (Any): further arguments of TorchRec's planner, which must be None.

    Raises:
        TypeError: an argument that neither planner has.
        ValueError: a topology without ranks or memory, ranks outside of it, or an argument of TorchRec's planner.

    Example:
        >>> from torchrec_qr import (
        ...     CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder)
        >>> from torchrec_qr.distributed import get_default_sharders
        >>> from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named
        >>> h100 = hardware_named("h100")
        >>> planner = CompositionalEmbeddingShardingPlanner(h100.topology(32, 8), batch_size=4096, hardware=h100)
        >>> ebc = CompositionalEmbeddingBagCollection(device=torch.device("meta"), tables=[
        ...     CompositionalEmbeddingBagConfig(name=f"t{m}", feature_names=[f"f{m}"], num_embeddings=10**7,
        ...         embedding_dim=128, partitions=QuotientRemainder(num_collisions=m)) for m in (4, 3163)])
        >>> plan = planner.plan(ebc, get_default_sharders())
        >>> {name: sharding.sharding_type for name, sharding in plan.plan[""].items()}["t3163"]
        'data_parallel'
    """

    def __init__(
        self,
        topology: Topology | None = None,
        batch_size: int | None = None,
        *,
        storage_reservation: StorageReservation | None = None,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        debug: bool = False,
        ranks: Mapping[str, Sequence[int]] | None = None,
        same_rank_as: Mapping[str, str] | None = None,
        hardware: Hardware | None = None,
        dense_optimizer: MakeOptimizer | None = None,
        replica_topology: Topology | None = None,
        **of_torchrec: Any,
    ) -> None:
        _refuse(of_torchrec)
        if topology is None:
            topology, hardware = _of_process_group(hardware)
        _check(topology, ranks or {})
        self._topology = topology
        self._batch_size = BATCH_SIZE if batch_size is None else batch_size
        if self._batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; allowed: at least 1 sample per rank")
        self._reservation = storage_reservation or FixedPercentageStorageReservation(_RESERVED)
        self._constraints = dict(constraints or {})
        self._ranks = dict(ranks or {})
        self._same_rank_as = dict(same_rank_as or {})
        self._hardware = hardware or hardware_of(topology)
        self._dense_optimizer = dense_optimizer
        self._replica_topology = replica_topology
        self._debug = debug

    @property
    def topology(self) -> Topology:
        """The ranks."""
        return self._topology

    def plan(self, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> ShardingPlan:
        """Returns a plan with every table of every module that has a sharder.

        Args:
            module (nn.Module): the model.
            sharders (Sequence[ModuleSharder[Any]]): the sharders.

        Raises:
            PlannerError: there are no tables, constraints name unknown tables, contradict one another or allow no
                option, or nothing fits. The message then has the table, its bytes, the bytes that ranks have left, and
                changes that make a plan fit.
        """
        estimated = self.propose(module, sharders)
        if self._debug:
            _LOG.info("%s", estimated)
        return estimated.sharding_plan()

    def collective_plan(
        self,
        module: nn.Module,
        sharders: Sequence[ModuleSharder[Any]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """Returns rank 0's plan on all ranks of ``pg``, which must call this together.

        Args:
            module (nn.Module): the model.
            sharders (Sequence[ModuleSharder[Any]] | None): the sharders. Default: `get_default_sharders`.
            pg (dist.ProcessGroup | None): the ranks. Default: all.

        Raises:
            PlannerError: `plan` raises it on rank 0. All ranks raise it.
            RuntimeError: there is no process group.
        """
        group = pg if pg is not None else dist.GroupMember.WORLD
        if group is None:
            raise RuntimeError("collective_plan needs torch.distributed.init_process_group(); plan does not")
        sharders = get_default_sharders() if sharders is None else sharders
        return plan_of_rank_0(lambda: self.plan(module, sharders), group)

    def propose(self, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> EstimatedPlan:
        """Returns the plan of `plan` with its estimated costs.

        Args:
            module (nn.Module): the model.
            sharders (Sequence[ModuleSharder[Any]]): the sharders.

        Raises:
            PlannerError: see `plan`.
        """
        ties, choices, cluster = self._problem(module, sharders)
        found = self._search(ties, choices, cluster)
        if isinstance(found, Misfit):
            raise Infeasible(ties, choices, cluster, found, self._topology, self._estimator).error()
        everywhere = list(range(self._topology.world_size))
        options, ranks_of_blocks = ties.apart(found.options), ties.ranks(found.packing.ranks)
        plans = [
            TablePlan(table, option, of_table, _flat(ranks, option, everywhere))
            for table, option, of_table, ranks in zip(ties.tables, options, choices, ranks_of_blocks, strict=True)
        ]
        fixed_ms = self._fixed_costs(ties.tables).ms(option.sharding_type for option in options)
        return EstimatedPlan(plans, self._topology, fixed_ms, list(cluster.memory))

    def estimate(self, plan: ShardingPlan, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> RankCosts:
        """Returns the costs of any plan on every rank.

        Args:
            plan (ShardingPlan): the plan, of this planner or not.
            module (nn.Module): the model.
            sharders (Sequence[ModuleSharder[Any]]): the sharders.

        Raises:
            PlannerError: the plan lacks a table.
        """
        estimator = self._estimator(self._topology)
        costs = RankCosts(self._topology.world_size)
        for table in find_tables(module, sharders, self._constraints, self._ranks):
            sharding = _sharding_of(plan, table)
            kind, kernel = sharding.sharding_type, sharding.compute_kernel
            costs.add_everywhere(estimator.everywhere(table, kind, kernel))
            if kind == DATA_PARALLEL:
                cost = estimator.shard(table, kind, kernel, rows=table.rows, columns=(0, table.columns))
                costs.add_everywhere(cost)
                continue
            assert isinstance(sharding.sharding_spec, EnumerableShardingSpec)
            shards = sharding.sharding_spec.shards
            blocks = num_row_blocks(shards)
            for i, shard in enumerate(shards):
                (rows, width), start = shard.shard_sizes, shard.shard_offsets[1]
                columns = (start, start + width)
                cost = estimator.shard(
                    table, kind, kernel, rows=rows, columns=columns, block=i % blocks, num_blocks=blocks
                )
                rank = None if shard.placement is None else shard.placement.rank()
                assert rank is not None
                costs.add(rank, cost)
        return costs

    def step_ms(self, plan: ShardingPlan, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> float:
        """Returns the estimated milliseconds of a step for embeddings under any plan: see `estimate`."""
        tables = find_tables(module, sharders, self._constraints, self._ranks)
        fixed_ms = self._fixed_costs(tables).ms(_sharding_of(plan, table).sharding_type for table in tables)
        return max(self.estimate(plan, module, sharders).work_ms) + fixed_ms

    def fits(self, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> bool:
        """Returns whether a plan fits: see `plan`."""
        ties, choices, cluster = self._problem(module, sharders)
        return not isinstance(most_frugal(ties.checked(choices), ties.bounds, cluster), Misfit)

    def _problem(
        self, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]
    ) -> tuple[RankTies, list[list[Option]], Cluster]:
        """Returns the tables with their ties, their options, and the memory of the ranks."""
        tables = find_tables(module, sharders, self._constraints, self._ranks)
        ties = RankTies(tables, self._same_rank_as, self._topology.world_size)
        cluster = self._cluster(module, sharders)
        enumerator = Enumerator(self._topology, self._estimator(self._topology), min(cluster.memory))
        return ties, [enumerator.options(table) for table in ties.tables], cluster

    def _search(self, ties: RankTies, choices: Sequence[Sequence[Option]], cluster: Cluster) -> Proposal | Misfit:
        fixed = self._fixed_costs(ties.tables)

        def rate(options: Sequence[Option], packing: Packing) -> float:
            # Prefer even ranks among plans that are about as fast, because estimates err.
            uneven = max(packing.greatest * len(packing.work) / max(sum(packing.work), 1e-12) / _EVEN, 1.0)
            return packing.greatest * uneven**_EVENNESS + fixed.ms(ties.sharding_types(options))

        return Search(ties.checked(choices), ties.bounds, cluster, rate).run()

    def _estimator(self, topology: Topology) -> Estimator:
        return Estimator(topology, self._batch_size, self._hardware, self._dense_optimizer, self._replica_topology)

    def _fixed_costs(self, tables: Sequence[PlannedTable]) -> FixedCosts:
        return FixedCosts(tables, self._hardware, self._batch_size, self._topology)

    def _cluster(self, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> Cluster:
        left = self._reservation.reserve(
            self._topology, self._batch_size, module, list(sharders), self._constraints or None
        )
        on_cpu = self._topology.compute_device == "cpu"
        storages = [device.storage for device in left.devices]
        return Cluster(
            memory=tuple(float(s.ddr if on_cpu else s.hbm) for s in storages),
            host_memory=tuple(float(s.ddr) for s in storages),
            group=self._topology.intra_group_size,
        )


def plan_of_rank_0(make: Callable[[], ShardingPlan], group: dist.ProcessGroup) -> ShardingPlan:
    """Returns the plan that ``make`` returns on rank 0 of ``group``. All its ranks must call this together.

    Args:
        make (Callable[[], ShardingPlan]): makes the plan. Rank 0 alone calls it.
        group (dist.ProcessGroup): the ranks.

    Raises:
        PlannerError: ``make`` raised an error, of which rank 0 raises itself.
    """
    outcome: list[Any] = [None]
    error: Exception | None = None
    if group.rank() == 0:
        try:
            outcome = [make()]
        except Exception as failed:  # send any error, because the other ranks wait
            error = failed
            outcome = [(str(failed), getattr(failed, "error_type", PlannerErrorType.OTHER))]
    dist.broadcast_object_list(outcome, dist.get_global_rank(group, 0), group=group)
    if error is not None:
        raise error
    if not isinstance(outcome[0], ShardingPlan):
        raise PlannerError(*outcome[0])
    return outcome[0]


def _refuse(of_torchrec: Mapping[str, Any]) -> None:
    for name, value in of_torchrec.items():
        if name not in _INSTEAD:
            raise TypeError(f"CompositionalEmbeddingShardingPlanner has no argument {name!r}")
        if value is not None:
            raise ValueError(f"{name}={value!r}; allowed: None; {_INSTEAD[name]}")


def _flat(of_blocks: list[list[int] | None], option: Option, everywhere: list[int]) -> list[int]:
    """Returns the ranks of all shards, in order."""
    ranks: list[int] = []
    for block, of_block in zip(option.blocks, of_blocks, strict=True):
        assert of_block is not None or block.scope is Scope.WORLD
        if of_block is None and len(option.blocks) == 1:
            return everywhere
        ranks += everywhere if of_block is None else of_block
    return ranks


def _sharding_of(plan: ShardingPlan, table: PlannedTable) -> Any:
    of_module: Any = plan.plan.get(table.path, {})
    if table.name not in of_module:
        raise PlannerError(f"table {table.name!r} of module {table.path!r} is not in the plan", NOT_IN_PLAN)
    return of_module[table.name]


def _check(topology: Topology, ranks: Mapping[str, Sequence[int]]) -> None:
    world = topology.world_size
    if world < 1:
        raise ValueError(f"topology: world_size={world}; allowed: at least 1 rank")
    if world % topology.intra_group_size:
        raise ValueError(f"topology: local_world_size={topology.local_world_size}; allowed: a divisor of {world} ranks")
    for device in topology.devices:
        memory = device.storage.ddr if topology.compute_device == "cpu" else device.storage.hbm
        if memory <= 0:
            raise ValueError(f"topology: rank {device.rank} has {memory} bytes of memory; allowed: above 0")
    for table, allowed in ranks.items():
        wrong = [rank for rank in allowed if not 0 <= rank < world]
        if wrong or not allowed:
            raise ValueError(f"table {table!r}: ranks={list(allowed)}; allowed: some of 0..{world - 1}")


def _of_process_group(hardware: Hardware | None) -> tuple[Topology, Hardware]:
    """Returns the topology of the process group, with the memory of this machine."""
    world = dist.get_world_size()
    local = get_local_size(world)
    if get_device_type() == "cpu":
        hardware = hardware or HARDWARE["cpu"]
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return hardware.topology(world, local, ram / local / GIB), hardware
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = next((h for name, h in HARDWARE.items() if name.upper() in card.name.upper()), HARDWARE["a100"])
    hardware = hardware or known
    return hardware.topology(world, local, card.total_memory / GIB), hardware
