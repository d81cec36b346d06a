"""The planner: every table of a model in its place, by work."""

import logging
import os
from collections.abc import Mapping, Sequence
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
from torchrec_qr.planner.estimators import Estimator
from torchrec_qr.planner.fixed_costs import FixedCosts
from torchrec_qr.planner.hardware import GIB, HARDWARE, Hardware, hardware_of
from torchrec_qr.planner.partitioner import Cluster, Misfit, Packing
from torchrec_qr.planner.placement import Placed, PlacedModel, RankCosts
from torchrec_qr.planner.proposer import Proposal, Search, most_frugal
from torchrec_qr.planner.remedies import Infeasible
from torchrec_qr.planner.storage import MakeOptimizer
from torchrec_qr.planner.tables import PlannedTable, find_tables

_RESERVED = 0.15
# Greatest over mean work up to which ranks are even, and how much more than that counts.
_EVEN = 1.05
_EVENNESS = 3

# Arguments of TorchRec's planner that have no meaning here, and what to use in their place.
_INSTEAD = {
    "enumerator": "this planner lists options of its own, which constraints narrow (sharding_types, compute_kernels)",
    "proposer": "this planner searches by itself; constraints tell it where a table may lie",
    "partitioner": "this planner places shards by itself; `ranks` tells it where a table may lie",
    "performance_model": "estimates follow `topology` and `hardware`",
    "stats": "`propose` returns all estimates, and debug=True logs them",
    "callbacks": "change the plan that `plan` returns, of which `estimate` tells the cost",
    "timeout_seconds": "the search ends after a number of trials",
    "plan_loader": "pass a stored plan to DistributedModelParallel in the place of a planner",
}
_LOG = logging.getLogger(__name__)


class CompositionalEmbeddingShardingPlanner(ShardingPlanner):
    """Places plain and compositional tables by work, in place of TorchRec's ``EmbeddingShardingPlanner``.

    Of all placements that fit, it looks for the least

        max over ranks of  Σ over tables of  (lookup + exchange + reduce)

    in estimated milliseconds of a step (see `torchrec_qr.planner.costs.Cost`), each table choosing among every sharding
    type that its sharder has. A plain table is estimated as TorchRec does. A compositional one is stored as
    Σ_j |P_j| · D_j values and their optimizer's state, replicated partitions on every rank; an id reads K rows; and one
    row per bag travels, whatever K.

    Args:
        topology: default: that of the process group, on this device.
        batch_size: of a rank; default: TorchRec's, 512.
        storage_reservation: what tables may not take; default: 15 % of each rank.
        constraints: TorchRec's, by table.
        debug: whether plans are logged: work per rank, and where each table lies and why.
        ranks: on which a table may lie, by table.
        hardware: factors that a topology has no field for; default: by the topology's device.
        dense_optimizer: makes the optimizer of what nothing steps in backward, such as plain data-parallel tables;
            default: SGD, which has no state.
        of_torchrec: parts of TorchRec's planner, which this one does not consist of: only None.

    Raises:
        ValueError: a topology without ranks or memory; ranks that it lacks; a part of TorchRec's planner.

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
        hardware: Hardware | None = None,
        dense_optimizer: MakeOptimizer | None = None,
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
        self._hardware = hardware or hardware_of(topology)
        self._dense_optimizer = dense_optimizer
        self._debug = debug

    def plan(self, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> ShardingPlan:
        """Returns a plan with every table of every module that has a sharder.

        Raises:
            PlannerError: no tables; constraints of unknown tables, or that leave a table no place; nothing fits, with
                the table, what it needs, what the ranks have left, and what would help.
        """
        placed = self.propose(module, sharders)
        if self._debug:
            _LOG.info("%s", placed)
        return placed.sharding_plan()

    def collective_plan(
        self,
        module: nn.Module,
        sharders: Sequence[ModuleSharder[Any]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """Returns rank 0's plan on all ranks of ``pg``, which must call this together.

        Raises:
            PlannerError: as `plan`, on every rank.
        """
        group = pg if pg is not None else dist.GroupMember.WORLD
        if group is None:
            raise RuntimeError("collective_plan needs torch.distributed.init_process_group(); plan does not")
        sharders = get_default_sharders() if sharders is None else sharders
        outcome: list[Any] = [None]
        error: Exception | None = None
        if group.rank() == 0:
            try:
                outcome = [self.plan(module, sharders)]
            except Exception as failed:  # the other ranks wait for the outcome, whatever it is
                error = failed
                outcome = [(str(failed), getattr(failed, "error_type", PlannerErrorType.OTHER))]
        dist.broadcast_object_list(outcome, dist.get_global_rank(group, 0), group=group)
        if error is not None:
            raise error
        if not isinstance(outcome[0], ShardingPlan):
            raise PlannerError(*outcome[0])
        return outcome[0]

    def propose(self, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> PlacedModel:
        """As `plan`, with the estimates behind it."""
        tables, choices, cluster = self._problem(module, sharders)
        found = self._search(tables, choices, cluster)
        if isinstance(found, Misfit):
            raise Infeasible(tables, choices, cluster, found, self._topology, self._estimator).error()
        everywhere = list(range(self._topology.world_size))
        placed = [
            Placed(table, option, of_table, _flat(ranks, option, everywhere))
            for table, option, of_table, ranks in zip(tables, found.options, choices, found.packing.placed, strict=True)
        ]
        fixed_ms = self._fixed_costs(tables).ms(option.sharding_type for option in found.options)
        return PlacedModel(placed, self._topology, fixed_ms, list(cluster.memory))

    def estimate(self, plan: ShardingPlan, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> RankCosts:
        """What a plan, from wherever, costs every rank.

        Raises:
            PlannerError: a table that it lacks.
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
        """The estimated time that a step spends on embeddings under a plan, from wherever."""
        tables = find_tables(module, sharders, self._constraints, self._ranks)
        fixed_ms = self._fixed_costs(tables).ms(_sharding_of(plan, table).sharding_type for table in tables)
        return max(self.estimate(plan, module, sharders).work_ms) + fixed_ms

    def fits(self, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> bool:
        """Whether there is a plan at all."""
        tables, choices, cluster = self._problem(module, sharders)
        return not isinstance(most_frugal(choices, [table.ranks for table in tables], cluster), Misfit)

    def _problem(
        self, module: nn.Module, sharders: Sequence[ModuleSharder[Any]]
    ) -> tuple[list[PlannedTable], list[list[Option]], Cluster]:
        """The tables, their options, and what the ranks have room for."""
        tables = find_tables(module, sharders, self._constraints, self._ranks)
        cluster = self._cluster(module, sharders)
        enumerator = Enumerator(self._topology, self._estimator(self._topology), min(cluster.memory))
        return tables, [enumerator.options(table) for table in tables], cluster

    def _search(
        self, tables: Sequence[PlannedTable], choices: Sequence[Sequence[Option]], cluster: Cluster
    ) -> Proposal | Misfit:
        fixed = self._fixed_costs(tables)

        def rate(options: Sequence[Option], packing: Packing) -> float:
            # Estimates err: of plans about as fast, one whose ranks are even has less to lose by that.
            uneven = max(packing.greatest * len(packing.work) / max(sum(packing.work), 1e-12) / _EVEN, 1.0)
            return packing.greatest * uneven**_EVENNESS + fixed.ms(o.sharding_type for o in options)

        return Search(choices, [table.ranks for table in tables], cluster, rate).run()

    def _estimator(self, topology: Topology) -> Estimator:
        return Estimator(topology, self._batch_size, self._hardware, self._dense_optimizer)

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


def _refuse(of_torchrec: Mapping[str, Any]) -> None:
    for name, value in of_torchrec.items():
        if name not in _INSTEAD:
            raise TypeError(f"CompositionalEmbeddingShardingPlanner has no argument {name!r}")
        if value is not None:
            raise ValueError(f"{name}={value!r}; allowed: None; {_INSTEAD[name]}")


def _flat(placed: list[list[int] | None], option: Option, everywhere: list[int]) -> list[int]:
    ranks: list[int] = []
    for block, of_block in zip(option.blocks, placed, strict=True):
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
    """The topology of this job: its ranks, and the memory of this machine."""
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
