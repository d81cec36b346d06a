"""The plan of a job from a file of ``torchrec-qr plan --json``, in place of one of its own."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torchrec.distributed.planner.types import PlannerError, Topology
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingPlan

from torchrec_qr.cli.schema import ConfigError, ConstraintSpec, PlannerSpec
from torchrec_qr.cli.schema.config_error import first_names
from torchrec_qr.cli.sizing.plan_file import SavedPlan, SavedTable, read_plan_file
from torchrec_qr.cli.sizing.table_meaning import TableMeaning
from torchrec_qr.distributed.sharder import CompositionalSharder
from torchrec_qr.planner.table_shards import TableShards
from torchrec_qr.planner.tables import PlannedTable, find_tables

_KEY = "planner.plan_file"
_ALLOWED = "a plan that `torchrec-qr plan --json` makes of this config on these ranks, or no planner.plan_file"


def saved_plan(
    path: str | Path, spec: PlannerSpec, model: nn.Module, sharders: Sequence[ModuleSharder[Any]], topology: Topology
) -> ShardingPlan:
    """Returns the plan of a file for the tables of a model.

    The batch size, the optimizer and the memory of the request may differ, because the plan stays the same.

    Args:
        path (str | Path): the file.
        spec (PlannerSpec): the ``planner:`` section, whose device chooses a plan of the file.
        model (nn.Module): the model.
        sharders (Sequence[ModuleSharder[Any]]): the sharders.
        topology (Topology): the ranks.

    Raises:
        ConfigError: the file is none of plans, has none for the device, or has one of other ranks, tables or
            constraints. The message has all differences.
    """
    saved = _of_device(path, spec)
    tables = find_tables(model, sharders)
    differences = list(_differences(saved, spec, tables, topology))
    if differences:
        lines = "\n  ".join([f"{path} does not fit this job:", *differences, f"allowed: {_ALLOWED}"])
        raise ConfigError(_KEY, str(path), _ALLOWED, lines)
    by_name = {table.name: table for table in saved.tables}
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    for table in tables:
        module = modules.setdefault(table.path, EmbeddingModuleShardingPlan())
        try:
            shards = _offered(by_name[table.name], table, topology.compute_device)
            module[table.name] = shards.parameter_sharding(table, topology)
        except PlannerError as error:
            raise ConfigError(_KEY, str(path), _ALLOWED, f"{path}: {error}") from error
    return ShardingPlan(dict(modules))


def _of_device(path: str | Path, spec: PlannerSpec) -> SavedPlan:
    devices = read_plan_file(path).devices
    name: str | None = spec.device
    if name is None and len(devices) == 1:
        (name,) = devices
    if name is None or name not in devices:
        given = "no planner.device" if name is None else f"planner.device {name!r}"
        allowed = first_names(list(devices)) or "a file with a plan"
        raise ConfigError(_KEY, str(path), allowed, f"{path} has no plan for {given}; allowed: {allowed}")
    saved = devices[name]
    if not saved.feasible:
        raise ConfigError(_KEY, str(path), _ALLOWED, f"{path} has no plan for {name!r}, because none fits")
    return saved


def _differences(
    saved: SavedPlan, spec: PlannerSpec, tables: Sequence[PlannedTable], topology: Topology
) -> Iterator[str]:
    request = saved.request
    if request.sharding_group_size is not None:
        yield f"sharding_group_size: saved {request.sharding_group_size}, here none, because a job has one group"
    for name in ("world_size", "local_world_size"):
        here = getattr(topology, name)
        if getattr(request, name) != here:
            yield f"{name}: saved {getattr(request, name)}, here {here}"
    for name, constraint in spec.constraints.items():
        if request.constraints.get(name) != constraint:
            yield f"planner.constraints.{name}: not those of the plan"
    yield from _broken_constraints(saved.tables, spec)
    yield from _table_differences({table.name: table for table in saved.tables}, tables)


def _broken_constraints(tables: Sequence[SavedTable], spec: PlannerSpec) -> Iterator[str]:
    """Yields the tables that an edited file has twice, or against the job's constraints."""
    by_name = {table.name: table for table in tables}
    for table in tables:
        if by_name[table.name] is not table:
            yield f"table {table.name!r}: twice in the plan; a plan has one"
        constraint = spec.constraints.get(table.name, ConstraintSpec())
        for key, given in (("sharding_types", table.sharding_type), ("compute_kernels", table.compute_kernel)):
            allowed = getattr(constraint, key)
            if allowed is not None and given not in allowed:
                yield f"planner.constraints.{table.name}.{key}: the plan has {given.value}"
        if constraint.ranks is not None and not set(table.ranks) <= set(constraint.ranks):
            yield f"planner.constraints.{table.name}.ranks: the plan has {list(table.ranks)}"
        other = by_name.get(constraint.same_rank_as) if constraint.same_rank_as is not None else None
        if other is not None and table.ranks != other.ranks:
            yield f"planner.constraints.{table.name}.same_rank_as: the plan has {list(table.ranks)}"


def _table_differences(saved: Mapping[str, TableMeaning], tables: Sequence[PlannedTable]) -> Iterator[str]:
    here: dict[str, str] = {}
    for table in tables:
        if table.name in here:
            yield f"table {table.name!r}: in the modules {here[table.name]!r} and {table.path!r}; a plan has one"
        elif table.name not in saved:
            yield f"table {table.name!r}: not in the plan"
        elif phrases := saved[table.name].differences_from(TableMeaning.of(table)):
            yield f"table {table.name!r}: {'; '.join(phrases)}"
        here[table.name] = table.path
    for name in saved:
        if name not in here:
            yield f"table {name!r}: in the plan, and not in this job"


def _offered(saved: SavedTable, table: PlannedTable, device: str) -> TableShards:
    """Returns the shards of a table, whose sharder offers their sharding type and kernel."""
    sharding_type, kernel, sharder = saved.sharding_type.value, saved.compute_kernel.value, table.sharder
    types = sharder.sharding_types(device)
    if sharding_type not in types:
        raise PlannerError(f"table {table.name!r}: {sharding_type}; allowed on {device}: {', '.join(types)}")
    if isinstance(sharder, CompositionalSharder):
        kernels = sharder.compute_kernels_of(table.config is not None, sharding_type, device)
    else:
        kernels = sharder.compute_kernels(sharding_type, device)
    if kernel not in kernels:
        raise PlannerError(f"table {table.name!r}: kernel {kernel}; allowed on {device}: {', '.join(kernels)}")
    return TableShards(sharding_type, kernel, saved.shard_columns, list(saved.ranks))
