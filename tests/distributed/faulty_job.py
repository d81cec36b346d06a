"""A job of two ranks, started by `torch.distributed.run`, of which rank 1 reads a bad batch in its second step."""

import sys

import torch
import torch.distributed as dist
from global_batches import batch_of
from sharded_model import NUM_IDS, shard, table
from torchrec import KeyedJaggedTensor

from torchrec_qr import QuotientRemainder


def spoiled(batch: KeyedJaggedTensor, fault: str) -> KeyedJaggedTensor:
    values = batch.values().clone()
    if fault == "float":
        values = values.float()
    else:
        values[0] = NUM_IDS
    return KeyedJaggedTensor(keys=batch.keys(), values=values, lengths=batch.lengths())


def main(fault: str) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    configs = [
        table("a", QuotientRemainder(num_collisions=7), "mult"),
        table("b", QuotientRemainder(num_collisions=7), "add"),
    ]
    model = shard(list(configs), "row_wise")
    for step in range(3):
        batch = batch_of(list(configs), step + 3, rank, world_size)
        if step == 1 and rank == 1:
            batch = spoiled(batch, fault)
        model(batch).square().sum().backward()
        print(f"rank {rank}: step {step} done", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
