"""The tables and the cluster of a job, from its YAML, for the planner."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_qr.cli.schema import ConfigError, PlannerSpec, load, load_tables, read_yaml
from torchrec_qr.cli.schema.config_error import errors_in_file
from torchrec_qr.cli.schema.planner_section import Device
from torchrec_qr.cli.sizing.plan_file import Request, Sync
from torchrec_qr.cli.sizing.rank_groups import RankGroups
from torchrec_qr.cli.sizing.table_meaning import TableMeaning
from torchrec_qr.configs import CompositionalEmbeddingBagConfig
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.distributed.fused_params import OPTIMIZERS
from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
from torchrec_qr.partitions import ExplicitPartitions, HashPartition, PartitionSpec, QuotientRemainder
from torchrec_qr.partitions.row_limit import within_rows
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, EstimatedPlan, Hardware, hardware_named
from torchrec_qr.planner.tables import find_tables

VARIANTS = ("full", "hash", "qr")

Tables = Sequence[EmbeddingBagConfig]


@dataclass(frozen=True)
class Sizing:
    """Tables and the cluster that they are for.

    Args:
        name (str): of the config.
        tables (Tables): plain and compositional.
        spec (PlannerSpec): the ``planner:`` section, complete.
        optimizer (str): of the tables, by its name in a job's YAML.
        groups (RankGroups | None): the groups of 2D parallelism. None means one group of all ranks.
    """

    name: str
    tables: Tables
    spec: PlannerSpec
    optimizer: str
    groups: RankGroups | None = None

    def plan(self) -> EstimatedPlan:
        """Returns the plan.

        Raises:
            PlannerError: none fits.
        """
        return self.planner().propose(self._collection, self._sharders)

    def fits(self) -> bool:
        """Returns whether a plan fits."""
        return self.planner().fits(self._collection, self._sharders)

    def planner(self) -> CompositionalEmbeddingShardingPlanner:
        spec = self.spec
        assert spec.world_size is not None
        hardware, groups = self.hardware, self.groups
        everywhere = hardware.topology(spec.world_size, spec.local_world_size, spec.hbm_gib)
        return CompositionalEmbeddingShardingPlanner(
            everywhere if groups is None else groups.topology(hardware, spec.hbm_gib),
            spec.batch_size,
            storage_reservation=FixedPercentageStorageReservation(spec.storage_reserve),
            constraints=spec.parameter_constraints(),
            ranks=spec.bound_ranks(),
            same_rank_as=spec.same_rank_as(),
            hardware=hardware,
            replica_topology=None if groups is None else everywhere,
        )

    @property
    def hardware(self) -> Hardware:
        """The hardware of the device."""
        assert self.spec.device is not None
        return hardware_named(self.spec.device)

    def meanings(self) -> list[TableMeaning]:
        """Returns what plans of the tables depend on."""
        return [TableMeaning.of(table) for table in find_tables(self._collection, self._sharders)]

    def sync(self, estimated: EstimatedPlan) -> Sync | None:
        """Returns the estimate of the copies of 2D parallelism, if there are several groups."""
        if self.groups is None:
            return None
        shards = estimated.sharded_bytes
        return Sync(
            copies=self.groups.copies,
            node_group_size=self.groups.node_group_size,
            copied_bytes=int(sum(shards)) * (self.groups.copies - 1),
            sync_bytes=int(max(shards)),
            sync_ms=self.groups.sync_ms(max(shards), self.hardware),
        )

    def request(self) -> Request:
        """Returns all that a plan depends on besides the tables."""
        spec, groups = self.spec, self.groups
        assert spec.device is not None
        assert spec.world_size is not None
        assert spec.local_world_size is not None
        assert spec.batch_size is not None
        return Request(
            device=spec.device,
            world_size=spec.world_size,
            local_world_size=spec.local_world_size,
            hbm_gib=spec.hbm_gib or self.hardware.memory_gib,
            storage_reserve=spec.storage_reserve,
            batch_size=spec.batch_size,
            optimizer=self.optimizer,
            sharding_group_size=None if groups is None else groups.group_size,
            inter_host_allreduce=groups is not None and groups.inter_host_allreduce,
            constraints=spec.constraints,
        )

    def of_tables(self, tables: Tables) -> "Sizing":
        return replace(self, tables=list(tables))

    def on_device(self, name: Device) -> "Sizing":
        """Returns the same on ranks of another device."""
        return replace(self, spec=replace(self.spec, device=name))

    def in_groups_of(self, size: int | None, inter_host_allreduce: bool) -> "Sizing":
        """Returns the same under 2D parallelism in groups of ``size`` ranks, if that is not None.

        Raises:
            ValueError: see `RankGroups`.
        """
        if size is None:
            if inter_host_allreduce:
                raise ValueError("--inter-host-allreduce; allowed: beside --sharding-group-size")
            return self
        world, local = self.spec.world_size, self.spec.local_world_size
        assert world is not None
        assert local is not None
        return replace(self, groups=RankGroups(world, local, size, inter_host_allreduce))

    def on(self, nodes: int, ranks: int) -> "Sizing":
        """Returns the same on another cluster, where no table is bound to a rank."""
        free = {name: replace(c, ranks=None) for name, c in self.spec.constraints.items()}
        return replace(self, spec=replace(self.spec, topology=f"{nodes}x{ranks}", constraints=free), groups=None)

    def fewest_ranks(self, most_nodes: int = 4096) -> int | None:
        """Returns the fewest ranks that hold the tables, of one node, or of so many nodes; None: none do."""
        per_node = self.spec.local_world_size or 1
        sizes = [(1, n) for n in range(1, per_node + 1)] + [(n, per_node) for n in range(2, most_nodes + 1)]

        def fits(size: tuple[int, int]) -> bool:
            return self.on(*size).fits()

        low, high = 0, 1
        while not fits(sizes[min(high, len(sizes)) - 1]):
            if high >= len(sizes):
                return None
            low, high = high, 2 * high
        nodes, ranks = sizes[bisect_left(sizes, True, low, min(high, len(sizes)) - 1, key=fits)]
        return nodes * ranks

    def variant(self, name: str) -> "Sizing":
        """Returns the same tables ``"full"``, or in as many rows by ``"hash"`` or ``"qr"``.

        Tables of hashed ids stay as they are, except under ``"hash"``, because they have no row for each id.
        """
        return self.of_tables([_as(name, table) for table in self.tables])

    @cached_property
    def _collection(self) -> CompositionalEmbeddingBagCollection:
        return CompositionalEmbeddingBagCollection(tables=list(self.tables), device=torch.device("meta"))

    @cached_property
    def _sharders(self) -> list[Any]:
        return [CompositionalEmbeddingBagCollectionSharder(OPTIMIZERS[self.optimizer].fused_params)]


def read_sizing(path: str | Path, overrides: Mapping[str, Any], optimizer: str | None = None) -> Sizing:
    """Reads a job's YAML; ``overrides`` replace keys of its ``planner:`` section if they are not None.

    A batch size and an optimizer that the library's own sections don't have are taken from the job's.

    Raises:
        ConfigError: headed by the file's name.
        OSError: the file cannot be read.
    """
    sections = read_yaml(path)
    with errors_in_file(path):
        tables = load_tables(sections, base_dir=Path(path).parent)
        if not tables:
            raise ConfigError("tables", [], "at least one table")
        section = {**(sections.get("planner") or {}), **{k: v for k, v in overrides.items() if v is not None}}
        batch_size = _at(sections, "train", "batch_size")
        if "batch_size" not in section and batch_size is not None:
            section["batch_size"] = batch_size
        spec = load(PlannerSpec, section, "planner")
        spec.check_tables([table.name for table in tables])
        for key in ("topology", "device", "batch_size"):
            if getattr(spec, key) is None:
                flag = f"--{key.replace('_', '-')}"
                raise ConfigError(f"planner.{key}", None, "a value", f"missing; give it, or {flag}")
        optimizer = optimizer or _at(sections, "optimizer", "sparse", "name") or "sgd"
        if optimizer not in OPTIMIZERS:
            raise ConfigError("optimizer.sparse.name", optimizer, ", ".join(OPTIMIZERS))
    return Sizing(str(path), list(tables), spec, optimizer)


def full(table: EmbeddingBagConfig) -> EmbeddingBagConfig:
    """Returns the table uncompressed."""
    return EmbeddingBagConfig(**_plain_fields(table))


def composed(table: EmbeddingBagConfig, partitions: PartitionSpec) -> CompositionalEmbeddingBagConfig:
    """Returns the table by other partitions, under its own operation if there are as many of them."""
    other = CompositionalEmbeddingBagConfig(**_plain_fields(table), partitions=partitions)
    if not isinstance(table, CompositionalEmbeddingBagConfig):
        return other
    if table.num_partitions == other.num_partitions:
        return replace(table, partitions=partitions)
    return replace(other, id_hash=table.id_hash, hash_seed=table.hash_seed)


def _plain_fields(table: EmbeddingBagConfig) -> dict[str, Any]:
    """Returns the fields of a table that do not depend on its storage."""
    names = ("name", "feature_names", "num_embeddings", "embedding_dim", "pooling", "data_type")
    return {name: getattr(table, name) for name in (*names, "weight_init_min", "weight_init_max")}


def is_given_map(table: EmbeddingBagConfig) -> bool:
    """Returns whether the user's own classes choose the ids that share rows."""
    return isinstance(table, CompositionalEmbeddingBagConfig) and isinstance(table.partitions, ExplicitPartitions)


def is_hashed(table: EmbeddingBagConfig) -> bool:
    """Returns whether ids are hashed into S, so that S is not the number of ids, and no table has a row for each."""
    return isinstance(table, CompositionalEmbeddingBagConfig) and table.id_hash is not None


def _as(variant: str, table: EmbeddingBagConfig) -> EmbeddingBagConfig:
    if not isinstance(table, CompositionalEmbeddingBagConfig):
        return full(table)
    if variant == "hash":
        return composed(table, HashPartition(rows=table.physical_rows))
    if is_hashed(table):
        return table
    if variant == "full":
        return full(table)
    if isinstance(table.partitions, QuotientRemainder):
        return table
    return composed(table, within_rows(table.num_embeddings, table.physical_rows))


def _at(sections: Mapping[str, Any], *keys: str) -> Any:
    found: Any = sections
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
