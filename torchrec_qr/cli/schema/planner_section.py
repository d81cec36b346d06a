"""The ``planner:`` section: the machines that a plan is for, and what it must keep to."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType

from torchrec_qr.cli.schema.config_error import (
    ConfigError,
    did_you_mean,
    errors_in_file,
    first_names,
    key_path,
    unknown_key,
)
from torchrec_qr.cli.schema.strict_loader import Range, load
from torchrec_qr.cli.schema.yaml_file import read_yaml

Device = Literal["cpu", "a100", "h100", "h200"]


@dataclass(frozen=True)
class ConstraintSpec:
    """Constraints on the plan of one table; None leaves the planner free.

    Args:
        sharding_types (tuple[ShardingType, ...] | None): allowed ones, by TorchRec's names (``table_wise``,
            ``row_wise``, …).
        compute_kernels (tuple[EmbeddingComputeKernel, ...] | None): allowed ones, by TorchRec's names (``fused``,
            ``dense``, …).
        ranks (tuple[int, ...] | None): on which the table may lie.
        same_rank_as (str | None): the table whose ranks this table takes.
        min_partition (int | None): least columns of a column-wise shard.
        pooling_factor (float | None): ids per sample that are looked up in the table, those of all its features
            together.

    Raises:
        ConfigError: an empty list.

    Example:
        >>> spec = load(ConstraintSpec, {"sharding_types": ["column_wise"], "min_partition": 32})
        >>> constraints = spec.parameter_constraints()
        >>> constraints.sharding_types, constraints.min_partition
        (['column_wise'], 32)
    """

    sharding_types: tuple[ShardingType, ...] | None = None
    compute_kernels: tuple[EmbeddingComputeKernel, ...] | None = None
    ranks: tuple[Annotated[int, Range(0)], ...] | None = None
    same_rank_as: str | None = None
    min_partition: Annotated[int, Range(4, multiple_of=4)] | None = None
    pooling_factor: Annotated[float, Range(above=0)] | None = None

    def __post_init__(self) -> None:
        for key in fields(self):
            if getattr(self, key.name) == ():
                raise ConfigError(key.name, [], "at least one")

    def parameter_constraints(self) -> ParameterConstraints:
        """Returns TorchRec's constraints, which have all of these but ``ranks`` and ``same_rank_as``."""
        constraints = ParameterConstraints(min_partition=self.min_partition)
        if self.sharding_types is not None:
            constraints.sharding_types = [sharding_type.value for sharding_type in self.sharding_types]
        if self.compute_kernels is not None:
            constraints.compute_kernels = [kernel.value for kernel in self.compute_kernels]
        if self.pooling_factor is not None:
            constraints.pooling_factors = [self.pooling_factor]
        return constraints


@dataclass(frozen=True)
class PlannerSpec:
    """The ``planner:`` section.

    Args:
        topology (str | None): ``"2x8"``: nodes × ranks per node.
        device (str | None): of every rank.
        hbm_gib (float | None): memory of a rank, in GiB; default: the device's.
        storage_reserve (float): fraction of it that the plan leaves free.
        batch_size (int | None): of a rank.
        constraints (dict[str, ConstraintSpec]): by table name.
        plan_file (str | None): a file of ``torchrec-qr plan --json`` whose plan a job takes, relative to the YAML file.

    Raises:
        ConfigError: a malformed topology, or a constraint's rank that it lacks.

    Example:
        >>> spec = load(PlannerSpec, {"topology": "2x8", "device": "h100", "batch_size": 8192, "constraints": {
        ...     "t_user": {"sharding_types": ["row_wise", "table_row_wise"], "pooling_factor": 10}}})
        >>> spec.world_size, spec.local_world_size, spec.storage_reserve
        (16, 8, 0.15)
        >>> constraints = spec.parameter_constraints()["t_user"]
        >>> constraints.sharding_types, constraints.pooling_factors
        (['row_wise', 'table_row_wise'], [10.0])
        >>> spec.check_tables(["t_users", "t_item"])
        Traceback (most recent call last):
        torchrec_qr.cli.schema.config_error.ConfigError: planner.constraints.t_user: no such table; did you mean
        't_users'?
    """

    topology: str | None = None
    device: Device | None = None
    hbm_gib: Annotated[float, Range(above=0)] | None = None
    storage_reserve: Annotated[float, Range(0, below=1)] = 0.15
    batch_size: Annotated[int, Range(1)] | None = None
    constraints: dict[str, ConstraintSpec] = field(default_factory=dict)
    plan_file: str | None = None

    def __post_init__(self) -> None:
        if self.topology is None:
            return
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.topology, re.ASCII):
            raise ConfigError("topology", self.topology, "'<nodes>x<ranks per node>', such as '2x8'")
        world_size = math.prod(self._shape(self.topology))
        for name, constraint in self.constraints.items():
            for i, rank in enumerate(constraint.ranks or ()):
                if rank >= world_size:
                    path = f"{key_path('constraints', name)}.ranks[{i}]"
                    raise ConfigError(path, rank, f"0..{world_size - 1}, the ranks of topology {self.topology}")

    @property
    def world_size(self) -> int | None:
        """W, of the topology."""
        return None if self.topology is None else math.prod(self._shape(self.topology))

    @property
    def local_world_size(self) -> int | None:
        """Ranks per node, of the topology."""
        return None if self.topology is None else self._shape(self.topology)[1]

    def check_tables(self, names: Iterable[str], path: str = "planner") -> None:
        """Raises ConfigError if a constraint names a table that is not among ``names``, with the nearest that is."""
        known = list(names)
        where = key_path(path, "constraints")
        unknown = sorted(set(self.constraints) - set(known))
        errors = [unknown_key(where, name, self.constraints[name], known, "no such table") for name in unknown]
        for name, other in self.same_rank_as().items():
            if other not in known:
                hint = did_you_mean(other, known) or f"allowed: {first_names(known)}"
                key = key_path(key_path(where, name), "same_rank_as")
                errors.append(ConfigError(key, other, "a table", f"no table {other!r}; {hint}"))
        if errors:
            raise ConfigError.joined(errors)

    def parameter_constraints(self) -> dict[str, ParameterConstraints]:
        """Returns the constraints by table name, as TorchRec's planner takes them."""
        return {name: constraint.parameter_constraints() for name, constraint in self.constraints.items()}

    def bound_ranks(self) -> dict[str, tuple[int, ...]]:
        """Returns the ranks that may own a table's shards, for the tables that name them."""
        return {name: c.ranks for name, c in self.constraints.items() if c.ranks is not None}

    def same_rank_as(self) -> dict[str, str]:
        """Returns the table whose ranks a table takes, for the tables that name one."""
        return {name: c.same_rank_as for name, c in self.constraints.items() if c.same_rank_as is not None}

    @staticmethod
    def _shape(topology: str) -> tuple[int, int]:
        nodes, ranks = topology.split("x")
        return int(nodes), int(ranks)


def read_planner(path: str | Path) -> PlannerSpec:
    """Returns the ``planner:`` section of a YAML file, all defaults if there is none; other sections are ignored.

    Raises:
        ConfigError: headed by the file's name.
        OSError: the file cannot be read.

    Example:
        >>> import os
        >>> read_planner(os.devnull).storage_reserve  # of a file without the section
        0.15
    """
    section = read_yaml(path).get("planner")
    with errors_in_file(path):
        return load(PlannerSpec, {} if section is None else section, "planner")
