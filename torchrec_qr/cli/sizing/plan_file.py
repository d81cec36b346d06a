"""The JSON of ``torchrec-qr plan --json``: a request and a plan for each device."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ShardingType

from torchrec_qr.cli.schema import ConfigError, ConstraintSpec, dump, load
from torchrec_qr.cli.schema.config_error import errors_in_file
from torchrec_qr.cli.sizing.table_meaning import TableMeaning
from torchrec_qr.planner.estimated_plan import EstimatedPlan, TablePlan


@dataclass(frozen=True)
class Request:
    """All that a plan depends on besides its tables.

    Args:
        device (str): the device of every rank.
        world_size (int): W.
        local_world_size (int): the ranks of a node.
        hbm_gib (float): the memory of a rank.
        storage_reserve (float): the fraction of it that the plan leaves free.
        batch_size (int): the samples of a rank.
        optimizer (str): the optimizer of the tables.
        sharding_group_size (int | None): N of 2D parallelism, whose plan is of N ranks. None means one group.
        inter_host_allreduce (bool): whether the ranks of such a group are consecutive.
        constraints (dict[str, ConstraintSpec]): the constraints by table.
    """

    device: str
    world_size: int
    local_world_size: int
    hbm_gib: float
    storage_reserve: float
    batch_size: int
    optimizer: str
    sharding_group_size: int | None
    inter_host_allreduce: bool
    constraints: dict[str, ConstraintSpec]

    def fingerprint(self, tables: Sequence[TableMeaning]) -> str:
        """Returns the SHA-256 of the request and its tables. Equal requests have equal ones on every machine."""
        text = json.dumps([dump(self), [dump(table) for table in tables]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class SavedRank:
    """The estimate of a rank: bytes at the peak of a step, their parts, and milliseconds."""

    rank: int
    peak_bytes: int
    value_bytes: int
    state_bytes: int
    buffer_bytes: int
    work_ms: float


@dataclass(frozen=True)
class SavedTable(TableMeaning):
    """A table, its shards, and the reason of its sharding type."""

    sharding_type: ShardingType
    compute_kernel: EmbeddingComputeKernel
    shard_columns: int
    ranks: tuple[int, ...]
    why: str

    @classmethod
    def planned(cls, planned: TablePlan) -> "SavedTable":
        """Returns a table of a plan."""
        shards = planned.shards
        return cls(
            **vars(TableMeaning.of(planned.table)),
            sharding_type=ShardingType(shards.sharding_type),
            compute_kernel=EmbeddingComputeKernel(shards.kernel),
            shard_columns=shards.columns,
            ranks=tuple(shards.ranks),
            why=planned.why,
        )


@dataclass(frozen=True)
class Sync:
    """The copies of 2D parallelism: see `torchrec_qr.cli.sizing.rank_groups.RankGroups`.

    Args:
        copies (int): the groups.
        node_group_size (int): the ranks of a group on one node.
        copied_bytes (int): the values and state of all copies except the first, without data-parallel tables.
        sync_bytes (int): those of the fullest rank, which it averages with its copies.
        sync_ms (float): the ms of one ``DMPCollection.sync()``.
    """

    copies: int
    node_group_size: int
    copied_bytes: int
    sync_bytes: int
    sync_ms: float


@dataclass(frozen=True)
class SavedVariant:
    """Other tables of the same ids: their bytes, whether a plan fits, and the fewest ranks for which one does."""

    bytes: int
    feasible: bool
    fewest_ranks: int | None


@dataclass(frozen=True)
class SavedPlan:
    """The answer for one device.

    Args:
        request (Request): the request.
        fingerprint (str): see `Request.fingerprint`.
        feasible (bool): whether a plan fits. Without one there are no ranks and no tables.
        peak_bytes (int | None): the bytes of the fullest rank at the peak of a step.
        step_ms (float | None): the ms of a step for embeddings.
        ranks (tuple[SavedRank, ...]): every rank.
        tables (tuple[SavedTable, ...]): every table.
        totals (dict[str, int]): ``bytes`` of the values of the tables, and ``bytes_full`` of the same uncompressed.
        sync (Sync | None): the copies of 2D parallelism.
        error (str | None): why no plan fits.
        compare (dict[str, SavedVariant]): the variants that ``--compare`` names.
    """

    request: Request
    fingerprint: str
    feasible: bool
    peak_bytes: int | None
    step_ms: float | None
    ranks: tuple[SavedRank, ...]
    tables: tuple[SavedTable, ...]
    totals: dict[str, int]
    sync: Sync | None = None
    error: str | None = None
    compare: dict[str, SavedVariant] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanFile:
    """The plans by device.

    Args:
        devices (dict[str, SavedPlan]): the answers, by the names of their devices.
    """

    devices: dict[str, SavedPlan]


def saved_ranks(estimated: EstimatedPlan) -> tuple[SavedRank, ...]:
    """Returns the estimate of every rank."""
    costs = [estimated.ranks[rank] for rank in range(len(estimated.ranks))]
    return tuple(
        SavedRank(
            rank=rank,
            peak_bytes=int(cost.memory),
            value_bytes=int(cost.parameters),
            state_bytes=int(cost.optimizer),
            buffer_bytes=int(cost.maps + cost.buffers),
            work_ms=cost.work_ms,
        )
        for rank, cost in enumerate(costs)
    )


def as_json(file: PlanFile) -> str:
    """Returns the text of a file of plans, of which `read_plan_file` makes an equal one."""
    return json.dumps(dump(file), indent=1)


def read_plan_file(path: str | Path) -> PlanFile:
    """Returns the plans of a file that ``torchrec-qr plan --json`` wrote.

    Raises:
        ConfigError: the file cannot be read, or is none of plans. The message names the file and each wrong key.
    """
    allowed = "a file that `torchrec-qr plan --json` wrote"
    try:
        content: Any = json.loads(Path(path).read_bytes())
    except OSError as error:
        problem = f"cannot be read: {error.strerror}; allowed: {allowed}"
        raise ConfigError("", str(path), allowed, problem).in_file(path) from error
    except ValueError as error:
        raise ConfigError("", str(path), allowed, f"not JSON: {error}; allowed: {allowed}").in_file(path) from error
    with errors_in_file(path):
        return load(PlanFile, content)
