"""Explicit maps of sharded tables: one copy a device, which DDP leaves alone, and which moves with the module."""

from typing import Any

import torch
from global_batches import batch_of
from ranks import run_ranks
from sharded_model import NUM_IDS, shard, table, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchrec_qr import CompositionalEmbeddingBagCollection, ExplicitPartitions
from torchrec_qr.distributed.lookup_kernel import CompositionalKernel, LocalShard

CLASSES = torch.stack([torch.arange(NUM_IDS) % 12, torch.arange(NUM_IDS) // 12])


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules, with those of lookups, which TorchRec keeps in a list of their collection."""
    lookups = [lookup for m in model.modules() for lookup in getattr(m, "_lookups", [])]
    return [*model.modules(), *(m for lookup in lookups for m in lookup.modules())]


def buffers_of_ddp(rank: int, world_size: int, sharding: str) -> tuple[list[str], int, int]:
    """Large buffers that DDP would send at every forward, the shards with a map, and the copies that they read."""
    configs = [table("explicit", ExplicitPartitions(CLASSES), "mult")]
    model = shard(configs, sharding)
    train(model, configs, range(2))
    # The unsharded collection may be left to DDP as a whole.
    wrapped = [m.module for m in modules_of(model) if isinstance(m, DistributedDataParallel)]
    wrapped.append(CompositionalEmbeddingBagCollection(tables=configs))
    sent = [name for m in wrapped for name, buffer in m.named_buffers() if buffer.numel() >= NUM_IDS]
    maps = [m.class_map for m in modules_of(model) if isinstance(m, LocalShard)]
    assert all(m is not None and torch.equal(m, CLASSES) for m in maps)
    return sent, len(maps), len({id(m) for m in maps} | {id(configs[0].bound_partitions.class_map)})


def test_no_forward_broadcasts_a_map() -> None:
    for sharding in ("row_wise", "data_parallel", "column_wise"):
        for sent, shards, copies in run_ranks(buffers_of_ddp, 2, sharding):
            assert (sent, copies) == ([], 1)
            assert shards >= 1


def moved(rank: int, world_size: int) -> tuple[bool, bool]:
    configs: list[Any] = [table("explicit", ExplicitPartitions(CLASSES), "mult")]
    model = shard(configs, "table_wise")
    before = model(batch_of(configs, 0, rank, world_size))
    shards = [m for m in modules_of(model) if isinstance(m, LocalShard)]
    kernels = [m for m in modules_of(model) if isinstance(m, CompositionalKernel)]
    for kernel in kernels:
        kernel.to("meta")
    on_meta = all(s.class_map is not None and s.class_map.is_meta for s in shards)
    for kernel in kernels:
        kernel.to_empty(device="cpu")
    return on_meta, torch.equal(model(batch_of(configs, 0, rank, world_size)), before)


def test_a_map_moves_with_its_shard_and_keeps_its_values() -> None:
    assert run_ranks(moved, 1) == [(True, True)]
