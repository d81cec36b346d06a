"""Advice for a model that does not fit: the changes that make a plan fit."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType, Topology

from torchrec_qr.configs import DTYPES, CompositionalEmbeddingBagConfig, CompositionalEmbeddingConfig
from torchrec_qr.distributed import (
    CompositionalEmbeddingBagCollectionSharder,
    CompositionalEmbeddingCollectionSharder,
)
from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
from torchrec_qr.modules.embedding_collection import CompositionalEmbeddingCollection
from torchrec_qr.partitions import QuotientRemainder
from torchrec_qr.partitions.row_limit import within_rows
from torchrec_qr.planner.enumerators import Enumerator, Option
from torchrec_qr.planner.estimators import Estimator
from torchrec_qr.planner.hardware import GIB
from torchrec_qr.planner.partitioner import Cluster, Misfit
from torchrec_qr.planner.proposer import most_frugal
from torchrec_qr.planner.rank_ties import RankTies
from torchrec_qr.planner.tables import PlannedTable

_SHOWN_RANKS = 16
# For more tables the advice has a lower bound of the number of ranks, because trials would take too long.
_TRIED_TABLES = 2000
_MOST_NODES = 4096
# TorchRec warns since 1.8 of a topology without this argument.
_WITHOUT_WARNING: dict[str, Any] = {
    name: True for name in ("created_by_factory",) if name in signature(Topology).parameters
}

# The config, the collection and the sharder of a table, with and without pooling.
_POOLED: tuple[Any, Any, Any] = (
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagCollectionSharder,
)
_UNPOOLED: tuple[Any, Any, Any] = (
    CompositionalEmbeddingConfig,
    CompositionalEmbeddingCollection,
    CompositionalEmbeddingCollectionSharder,
)

EstimatorFor = Callable[[Topology], Estimator]


@dataclass(frozen=True)
class Infeasible:
    """Tables that do not fit a cluster, and changes that make a plan fit. Each change has been tried.

    Args:
        ties (RankTies): the tables of the model, and which of them take the same ranks.
        choices (Sequence[Sequence[Option]]): the options of each table.
        cluster (Cluster): the memory of the ranks.
        misfit (Misfit): the block that fits no rank.
        topology (Topology): the topology of the ranks.
        estimator_for (EstimatorFor): returns the estimator for another topology.
    """

    ties: RankTies
    choices: Sequence[Sequence[Option]]
    cluster: Cluster
    misfit: Misfit
    topology: Topology
    estimator_for: EstimatorFor

    def error(self) -> PlannerError:
        """Returns an error that lists the changes that make a plan fit, the cheapest first."""
        memory = "host memory" if self.misfit.on_host else "memory"
        lines = [
            f"no plan fits: {self._names} {'needs' if len(self._members) == 1 else 'need'} {_gib(self.misfit.needs)} "
            f"of {memory} on a rank, and the ranks have left {_left(self.misfit.left)}"
        ]
        changes = (self._untied(), self._sharding_type(), self._compression(), self._ranks())
        found = [text for text in changes if text is not None]
        if found:
            lines.append("what would help, cheapest first:")
            lines += [f"  {i}. {change}" for i, change in enumerate(found, 1)]
        else:
            lines.append("neither more compression, nor another sharding type, nor more ranks would help")
        return PlannerError("\n".join(lines), PlannerErrorType.INSUFFICIENT_STORAGE)

    @property
    def _tables(self) -> Sequence[PlannedTable]:
        return self.ties.tables

    @property
    def _members(self) -> list[int]:
        """The numbers of the tables that fit no rank: several if they are tied to the same one."""
        return self.ties.groups[self.misfit.table]

    @cached_property
    def _at(self) -> int:
        """The number of the table that fits no rank, or of the largest one if several are tied."""
        return max(self._members, key=lambda t: min(o.mean_memory for o in self.choices[t]))

    @property
    def _table(self) -> PlannedTable:
        return self._tables[self._at]

    @property
    def _names(self) -> str:
        if len(self._members) == 1:
            return f"table {self._table.name!r}"
        return f"tables {self.ties.names(self.misfit.table)}, which same_rank_as ties,"

    @cached_property
    def _enumerator(self) -> Enumerator:
        return Enumerator(self.topology, self.estimator_for(self.topology), min(self.cluster.memory))

    def _with(self, options: Sequence[Option]) -> list[Sequence[Option]]:
        """Returns the choices, with other options for the table that does not fit."""
        return [*self.choices[: self._at], options, *self.choices[self._at + 1 :]]

    def _fits(self, choices: Sequence[Sequence[Option]]) -> bool:
        return self._groups_fit(self.ties.merged(choices))

    def _groups_fit(self, choices: Sequence[Sequence[Option]]) -> bool:
        return all(choices) and not isinstance(most_frugal(choices, self.ties.bounds, self.cluster), Misfit)

    def _untied(self) -> str | None:
        """Returns that the tables fit on different ranks, if they are tied."""
        if len(self._members) == 1:
            return None
        bounds = [table.ranks for table in self._tables]
        if isinstance(most_frugal(self.choices, bounds, self.cluster), Misfit):
            return None
        return f"different ranks: no same_rank_as for tables {self.ties.names(self.misfit.table)}"

    def _sharding_type(self) -> str | None:
        """Returns another sharding type of the table, or else of all tables whose constraints have sharding types."""
        free = [self._enumerator.options(_unconstrained(self._tables[t])) for t in self._members]
        others = self.ties.merged(self.choices)
        for option in sorted(self.ties.options_of(free), key=lambda o: o.mean_work):
            others[self.misfit.table] = [option]
            if self._groups_fit(others):
                tied = "table" if len(free) == 1 else "tables"
                return f"another sharding type: {option.sharding_type} for {tied} {self.ties.names(self.misfit.table)}"
        bound = [t for t in self._tables if t.constraints is not None and t.constraints.sharding_types]
        if not bound:
            return None
        choices = [self._enumerator.options(_unconstrained(t)) for t in self._tables]
        if not self._fits(choices):
            return None
        return f"other sharding types: no sharding_types in the constraints of {len(bound)} tables"

    def _compression(self) -> str | None:
        """Returns a compression of the table, or else of all tables to one number of rows."""
        alone = self._least_collisions()
        if alone is not None:
            now = self._table.num_embeddings / self._table.rows
            return (
                f"more compression: QuotientRemainder(num_collisions={alone}) for table {self._table.name!r}, which is "
                f"{self._table.num_embeddings:,} ids in {self._table.rows:,} rows ({now:.1f}×) now"
            )

        def fits(rows: int) -> bool:
            return self._fits(
                [self._options_within(t, o, rows) for t, o in zip(self._tables, self.choices, strict=True)]
            )

        if not fits(1):
            return None
        rows = bisect_left(range(1, max(t.rows for t in self._tables) + 1), True, key=lambda rows: not fits(rows))
        return f"more compression: at most {rows:,} rows in each table (`torchrec-qr plan --fit` writes them out)"

    def _least_collisions(self) -> int | None:
        table = self._table

        def fits(collisions: int) -> bool:
            options = self._options_of(table, QuotientRemainder(num_collisions=collisions))
            return self._fits(self._with(options))

        most = math.isqrt(table.num_embeddings)
        return bisect_left(range(most), True, lo=2, key=fits) if most >= 2 and fits(most) else None

    def _options_within(self, table: PlannedTable, options: Sequence[Option], rows: int) -> Sequence[Option]:
        return options if table.rows <= rows else self._options_of(table, within_rows(table.num_embeddings, rows))

    def _options_of(self, table: PlannedTable, partitions: QuotientRemainder) -> list[Option]:
        return self._enumerator.options(compressed(table, partitions))

    def _ranks(self) -> str | None:
        group = self.topology.intra_group_size
        nodes = self.cluster.world_size // group
        if len(self._tables) > _TRIED_TABLES:
            total = sum(min(o.mean_memory for o in options) for options in self.choices) * self.cluster.world_size
            least = math.ceil(total / min(self.cluster.memory) / group)
            return (
                f"more ranks: at least {least * group} of this memory, now {nodes * group}" if least > nodes else None
            )

        def fits(nodes: int) -> bool:
            topology = with_ranks(self.topology, nodes * group)
            cluster = replace(
                self.cluster,
                memory=(min(self.cluster.memory),) * topology.world_size,
                host_memory=(min(self.cluster.host_memory),) * topology.world_size,
            )
            enumerator = Enumerator(topology, self.estimator_for(topology), min(cluster.memory))
            choices = [enumerator.options(replace(t, ranks=None)) for t in self._tables]
            merged = self.ties.merged(choices)
            return not isinstance(most_frugal(merged, [None] * len(merged), cluster), Misfit)

        last = nodes
        while last < _MOST_NODES:
            last *= 2
            if fits(last):
                least = bisect_left(range(last), True, lo=nodes + 1, key=fits)
                return f"more ranks: {least * group} ({least}x{group}), now {nodes * group}"
        return None


def compressed(table: PlannedTable, partitions: QuotientRemainder) -> PlannedTable:
    """Returns a compositional table of ``partitions`` under the same constraints."""
    fields: dict[str, Any] = {
        "name": table.name,
        "feature_names": [f"{table.name}_{i}" for i in range(table.num_features)],
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.columns,
        "data_type": next(t for t, dtype in DTYPES.items() if dtype == table.parameter.dtype),
        "partitions": partitions,
    }
    make_config, make_collection, make_sharder = _POOLED if table.is_pooled else _UNPOOLED
    config = make_config(**fields)
    module = make_collection(tables=[config], device=torch.device("meta"))
    sharder = make_sharder(dict(table.fused_params))
    parameter = sharder.shardable_parameters(module)[table.name]
    return replace(table, parameter=parameter, module=module, sharder=sharder, config=config)


def with_ranks(topology: Topology, world_size: int) -> Topology:
    """Returns the topology with another number of the same ranks."""
    storage = topology.devices[0].storage
    return Topology(
        world_size=world_size,
        compute_device=topology.compute_device,
        hbm_cap=storage.hbm,
        ddr_cap=storage.ddr,
        ssd_cap=storage.ssd,
        local_world_size=topology.local_world_size,
        pod_size=topology.intra_group_size // topology.local_world_size,
        hbm_mem_bw=topology.hbm_mem_bw,
        ddr_mem_bw=topology.ddr_mem_bw,
        ssd_mem_bw=topology.ssd_mem_bw,
        hbm_to_ddr_mem_bw=topology.hbm_to_ddr_mem_bw,
        bwd_compute_multiplier=topology.bwd_compute_multiplier,
        weighted_feature_bwd_compute_multiplier=topology.weighted_feature_bwd_compute_multiplier,
        uneven_sharding_perf_multiplier=topology.uneven_sharding_perf_multiplier,
        generalized_comms_bandwidths=topology.comms_bandwidths,
        **_WITHOUT_WARNING,
    )


def _unconstrained(table: PlannedTable) -> PlannedTable:
    if table.constraints is None:
        return table
    return replace(table, constraints=replace(table.constraints, sharding_types=None))


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if abs(size) >= 0.01 * GIB else f"{size / 2**20:.2f} MiB"


def _left(left: Sequence[float]) -> str:
    """Returns the bytes that ranks have left, those of equal ones once."""
    groups = [(text, [rank for rank, _ in of]) for text, of in groupby(enumerate(map(_gib, left)), key=lambda e: e[1])]
    if len(groups) > _SHOWN_RANKS:
        return f"{_gib(min(left))} to {_gib(max(left))} (rank {max(range(len(left)), key=left.__getitem__)})"
    return ", ".join(
        f"{text} (rank {ranks[0]})" if len(ranks) == 1 else f"{text} (ranks {ranks[0]}-{ranks[-1]})"
        for text, ranks in groups
    )
