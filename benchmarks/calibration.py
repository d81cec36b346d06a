"""The constants of a host, measured where they are used: collectives over its link, lookups in its memory."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, data_parallel, table_wise
from torchrec.distributed.types import ShardingPlan

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.planner import Hardware

TABLE_WISE, COLUMN_WISE, DATA_PARALLEL = "table_wise", "column_wise", "data_parallel"

ROWS, COLUMNS, BATCH = 100_000, 64, 2048
COUNT = 4  # tables of a rank
_FEW = 8  # samples, and rows
_ROW = COLUMNS * 4
_PASSES = 3  # TorchRec: backward takes twice what forward does
_NARROW = 1.15  # TorchRec: rows of 64 columns


@dataclass(frozen=True)
class _Case:
    """A step to be timed.

    Args:
        kinds: the sharding type of each table.
        rows: S of each.
    """

    kinds: tuple[str, ...]
    rows: int = 8 * _FEW
    per_bag: int = 1
    batch: int = _FEW
    compositional: bool = True


def link_constants(rounds: int, base: Hardware) -> dict[str, float]:
    """GB/s that a rank sends, up to which message it receives meanwhile, and what sharding types take beside bytes.

    The last from steps of next to no samples and rows: of one sharding type, of two, and with one table replicated.
    ``base`` has what a shard and a replica take.
    """
    world = dist.get_world_size()
    size = 4 * 2**20
    link = size / max(_median(lambda: _one_way(size), rounds) - _median(lambda: _one_way(1024), rounds), 1e-3)
    # In turn, a message takes twice what it does at once.
    messages = [int(2 ** (19 + i / 2)) // 8 * 8 for i in range(6)]
    overlapped = list(
        takewhile(
            lambda m: _median(lambda: _all_to_all(m * world // (world - 1)), rounds) < 1.5 * m / link,
            messages,
        )
    )
    count = 3 * COUNT
    one, two, replicated = _steps_ms(
        4 * rounds,
        _Case((TABLE_WISE,) * count),
        _Case((TABLE_WISE,) * (count - 1) + (COLUMN_WISE,)),
        _Case((TABLE_WISE,) * (count - 1) + (DATA_PARALLEL,)),
    )
    return {
        "link_gb_s": link / 1e6,
        "overlap_mib": math.inf if overlapped == messages else max(overlapped, default=0) / 2**20,
        "sharding_ms": max(two - one, 0.0),
        "replication_ms": max(replicated - one - 2 * base.replica_ms - base.shard_ms * (world - 1) / world, 0.0),
    }


def lookup_constants(rounds: int, gb_s: float) -> dict[str, float]:
    """Bandwidth at which TorchRec's formula gives a plain table's step, and factors of a compositional one's.

    From differences of steps: more ids per bag, more tables, more replicated ones, more of their rows, more sharding
    types. ``gb_s`` is the link's.
    """
    world = dist.get_world_size()
    few, many = 1, 16
    kinds = (TABLE_WISE,) * (COUNT * world)
    plain_few, plain_many, few_ids, many_ids = _steps_ms(
        rounds,
        *(_Case(kinds, ROWS, n, BATCH, compositional) for compositional in (False, True) for n in (few, many)),
    )
    # A rank's tables are looked up for all ranks; of the ids, those of other ranks travel.
    ids = (many - few) * BATCH * world * COUNT
    travel = 8 * (world - 1) / world / (gb_s * 1e6)
    per_plain = max((plain_many - plain_few) / ids - travel, 1e-9)
    per_composed = max((many_ids - few_ids) / ids - travel, 1e-9)
    bandwidth = _PASSES * _NARROW * (8 + _ROW) / per_plain
    # Two rows read and one composition, measured as one.
    factor = (per_composed * bandwidth / _PASSES / _NARROW - 8) / (2 * _ROW)
    shard, replica = _fixed_ms(4 * rounds)
    return {
        "memory_gb_s": bandwidth / 1e6,
        "lookup_factor": factor,
        "concat_factor": _concat_ms(2 * rounds) * bandwidth / (3 * COUNT * BATCH * _ROW),
        "replica_factor": _replica_ms_per_byte(rounds) * 0.5 * bandwidth,
        "replica_ms": replica,
        "shard_ms": shard,
    }


def _fixed_ms(rounds: int) -> tuple[float, float]:
    """What a shard and a replicated partition take beside their bytes."""
    world, count = dist.get_world_size(), 3 * COUNT
    fewer, more, one, half = _steps_ms(
        rounds,
        _Case((TABLE_WISE,) * COUNT),
        _Case((TABLE_WISE,) * count),
        _Case((TABLE_WISE,) * (count - 1) + (DATA_PARALLEL,)),
        _Case((TABLE_WISE,) * (count // 2) + (DATA_PARALLEL,) * (count // 2)),
    )
    shard = max((more - fewer) * world / (count - COUNT), 0.0)
    tables = count // 2 - 1
    # A rank has a shard of every replicated table, and had one of each W-th.
    replica = (half - one - tables * shard * (world - 1) / world) / (2 * tables)
    return shard, max(replica, 0.0)


def _concat_ms(rounds: int) -> float:
    """What two sharding types of a module take more than one at many samples than at few."""
    count = 3 * COUNT
    one, two = (TABLE_WISE,) * count, (TABLE_WISE, COLUMN_WISE) * (count // 2)
    few_one, few_two, many_one, many_two = _steps_ms(
        rounds, *(_Case(kinds, batch=batch) for batch in (_FEW, BATCH) for kinds in (one, two))
    )
    return max(many_two - many_one - (few_two - few_one), 0.0)


def _replica_ms_per_byte(rounds: int, rows: int = 50_000) -> float:
    """Of a replicated gradient, without the reduction itself: what grows with rows that no id touches."""
    small, large = _steps_ms(rounds, *(_Case((DATA_PARALLEL,), n, batch=BATCH) for n in (rows, 5 * rows)))
    sizes = [n // 4 * _ROW for n in (rows, 5 * rows)]
    reduced = [_median(lambda size=size: _all_reduce(size), rounds) for size in sizes]  # type: ignore[misc]
    return max(large - small - (reduced[1] - reduced[0]), 0.0) / (sizes[1] - sizes[0])


def _all_to_all(size: int) -> None:
    send = torch.empty(size, dtype=torch.uint8)
    dist.all_to_all_single(torch.empty_like(send), send)


def _one_way(size: int) -> None:
    """From rank 0 to all others, so many bytes in all."""
    rank, others = dist.get_rank(), dist.get_world_size() - 1
    sent = [0] + [size // others if rank == 0 else 0] * others
    received = [0 if rank == 0 else size // others] + [0] * others
    output = torch.empty(sum(received), dtype=torch.uint8)
    dist.all_to_all_single(output, torch.empty(sum(sent), dtype=torch.uint8), received, sent)


def _all_reduce(size: int) -> None:
    dist.all_reduce(torch.zeros(size // 4))


def _ms(step: Callable[[], None]) -> float:
    """The greatest over ranks, which begin together."""
    dist.barrier()
    start = time.perf_counter()
    step()
    spent = torch.tensor([(time.perf_counter() - start) * 1e3])
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def _median(step: Callable[[], None], rounds: int) -> float:
    return statistics.median([_ms(step) for _ in range(rounds + 2)][2:])


def _steps_ms(rounds: int, *cases: _Case) -> list[float]:
    """Median ms of each case, which take turns: what is wanted of them is their differences."""
    # Sharded by all ranks in one order, which a set has not.
    models = {c: _sharded_model(c) for c in dict.fromkeys(replace(c, per_bag=1, batch=_FEW) for c in cases)}
    steps = []
    for case in cases:
        model = models[replace(case, per_bag=1, batch=_FEW)]
        batch = _batch(len(case.kinds), case.per_bag, case.rows, case.batch)
        steps.append(partial(_step, model, batch))
    times = [[_ms(step) for step in steps] for _ in range(rounds + 2)][2:]
    return [statistics.median(of_case) for of_case in zip(*times, strict=True)]


def _sharded_model(case: _Case) -> nn.Module:
    world = dist.get_world_size()
    module, sharder = _collection(len(case.kinds), case.compositional, case.rows)
    how = {
        f"t{i}": data_parallel()
        if kind == DATA_PARALLEL
        else table_wise(rank=i % world)
        if kind == TABLE_WISE
        else column_wise(ranks=[i % world])
        for i, kind in enumerate(case.kinds)
    }
    return _sharded(module, sharder, how)


def _collection(count: int, compositional: bool, rows: int) -> tuple[nn.Module, Any]:
    fused = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.01}
    common: list[dict[str, Any]] = [
        {"name": f"t{i}", "feature_names": [f"f{i}"], "num_embeddings": rows, "embedding_dim": COLUMNS}
        for i in range(count)
    ]
    meta = torch.device("meta")
    if compositional:
        tables = [CompositionalEmbeddingBagConfig(**c, partitions=QuotientRemainder(num_collisions=4)) for c in common]
        return (
            CompositionalEmbeddingBagCollection(tables=list(tables), device=meta),
            CompositionalEmbeddingBagCollectionSharder(fused),
        )
    plain = [EmbeddingBagConfig(**c) for c in common]
    return EmbeddingBagCollection(tables=plain, device=meta), EmbeddingBagCollectionSharder(fused)


class _Loss(nn.Module):
    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.ebc = collection
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        return self.ebc(batch).values().mean() * self.scale


def _sharded(module: nn.Module, sharder: Any, how: dict[str, Any]) -> nn.Module:
    world = dist.get_world_size()
    plan = construct_module_sharding_plan(module, how, sharder, world, world, "cpu")
    for sharding in plan.values():
        if sharding.sharding_type != "data_parallel":
            sharding.compute_kernel = "fused"
    return DistributedModelParallel(
        _Loss(module),
        device=torch.device("cpu"),
        plan=ShardingPlan({"ebc": plan}),
        sharders=[sharder],
    )


def _step(model: nn.Module, batch: KeyedJaggedTensor) -> None:
    model(batch).backward()


def _batch(count: int, per_bag: int, rows: int, batch: int) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(0)
    return KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(count)],
        values=torch.randint(0, rows, (count * batch * per_bag,), generator=generator),
        lengths=torch.full((count * batch,), per_bag),
    )
