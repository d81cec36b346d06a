"""The constants of a host, measured where they are used: collectives over its link, lookups in its memory."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, table_wise
from torchrec.distributed.types import ShardingPlan

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder

ROWS, COLUMNS, BATCH = 100_000, 64, 2048
COUNT = 4  # tables of a rank
_FEW = 8  # samples
_ROW = COLUMNS * 4
_PASSES = 3  # TorchRec: backward takes twice what forward does
_NARROW = 1.15  # TorchRec: rows of 64 columns


def collective_constants(rounds: int) -> tuple[float, float]:
    """GB/s that a rank sends in an all-to-all, and ms that one takes without bytes."""
    world = dist.get_world_size()
    latency = _median(lambda: _all_to_all(1024), rounds)
    size = 8 * 2**20
    spent = _median(lambda: _all_to_all(size), rounds) - latency
    return size * (world - 1) / world / max(spent, 1e-3) / 1e6, latency


def lookup_constants(rounds: int, gb_s: float) -> dict[str, float]:
    """Bandwidth at which TorchRec's formula gives a plain table's step, and factors of a compositional one's.

    From differences of steps: more ids per bag, more tables, more replicated rows. ``gb_s`` is the link's.
    """
    world = dist.get_world_size()
    few, many = 1, 16
    plain = _step_ms(rounds, few, many, compositional=False)
    composed = _step_ms(rounds, few, many, compositional=True)
    # A rank's tables are looked up for all ranks; of the ids, those of other ranks travel.
    ids = (many - few) * BATCH * world * COUNT
    travel = 8 * (world - 1) / world / (gb_s * 1e6)
    per_plain = max((plain[1] - plain[0]) / ids - travel, 1e-9)
    per_composed = max((composed[1] - composed[0]) / ids - travel, 1e-9)
    bandwidth = _PASSES * _NARROW * (8 + _ROW) / per_plain
    # Two rows read and one composition, measured as one.
    factor = (per_composed * bandwidth / _PASSES / _NARROW - 8) / (2 * _ROW)
    # With next to no samples, what another table takes beside its bytes.
    one, two = (_step_ms(rounds, 1, 1, compositional=True, count=n, batch=_FEW)[0] for n in (COUNT, 3 * COUNT))
    shard = max((two - one) / (2 * COUNT), 0.0)
    return {
        "memory_gb_s": bandwidth / 1e6,
        "lookup_factor": factor,
        "shard_ms": shard,
        "replica_factor": _replica_ms_per_byte(rounds) * 0.5 * bandwidth,
    }


def _all_to_all(size: int) -> None:
    send = torch.empty(size, dtype=torch.uint8)
    dist.all_to_all_single(torch.empty_like(send), send)


def _all_reduce(size: int) -> None:
    dist.all_reduce(torch.zeros(size // 4))


def _median(step: Callable[[], None], rounds: int) -> float:
    """Ms, the greatest over ranks."""
    times = []
    for i in range(rounds + 2):
        dist.barrier()
        start = time.perf_counter()
        step()
        spent = torch.tensor([(time.perf_counter() - start) * 1e3])
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        if i > 1:
            times.append(float(spent))
    return statistics.median(times)


def _step_ms(
    rounds: int,
    few: int,
    many: int,
    compositional: bool,
    count: int = COUNT,
    rows: int = ROWS,
    replicate: bool = False,
    batch: int = BATCH,
) -> tuple[float, float]:
    """Ms of a step with few and with many ids per bag, of ``count`` tables on each rank."""
    total = count * (1 if replicate else dist.get_world_size())
    module, sharder = _collection(total, compositional, rows)
    how = {f"t{i}": data_parallel() if replicate else table_wise(rank=i % dist.get_world_size()) for i in range(total)}
    model = _sharded(module, sharder, how)
    first, second = _batch(total, few, rows, batch), _batch(total, many, rows, batch)
    return _median(lambda: _step(model, first), rounds), _median(lambda: _step(model, second), rounds)


def _replica_ms_per_byte(rounds: int, rows: int = 50_000) -> float:
    """Of a replicated gradient, without the reduction itself: what grows with rows that no id touches."""
    small, _ = _step_ms(rounds, 1, 1, True, 1, rows, replicate=True)
    large, _ = _step_ms(rounds, 1, 1, True, 1, 5 * rows, replicate=True)
    sizes = [n // 4 * _ROW for n in (rows, 5 * rows)]
    reduced = [_median(lambda size=size: _all_reduce(size), rounds) for size in sizes]  # type: ignore[misc]
    return max(large - small - (reduced[1] - reduced[0]), 0.0) / (sizes[1] - sizes[0])


def _collection(count: int, compositional: bool, rows: int) -> tuple[nn.Module, Any]:
    fused = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.01}
    common: list[dict[str, Any]] = [
        {"name": f"t{i}", "feature_names": [f"f{i}"], "num_embeddings": rows, "embedding_dim": COLUMNS}
        for i in range(count)
    ]
    meta = torch.device("meta")
    if compositional:
        tables = [CompositionalEmbeddingBagConfig(**c, partitions=QuotientRemainder(rows, 4)) for c in common]
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
