"""Shards a DLRM with quotient-remainder tables over ranks, and trains it by TorchRec's pipeline.

Run: torchrun --nproc-per-node 2 examples/sharded.py
It prints where the tables lie, and the log loss of the first and of the last steps. Our sharders are all that is new.
"""

import os

import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.distributed import get_default_sharders

SIZES, DIM, BATCH, STEPS = {"user": 100_000, "item": 20_000}, 16, 512, 200
TASTES = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in SIZES.values()]


def generated_batch(seed: int) -> Batch:
    """Returns rows of a user and an item, often of frequent ones, and of a click that the tastes of both explain."""
    random = torch.Generator().manual_seed(seed)
    ids = [(size ** torch.rand(BATCH, generator=random)).long() - 1 for size in SIZES.values()]
    clicks = torch.bernoulli(torch.sigmoid(TASTES[0][ids[0]] + TASTES[1][ids[1]]), generator=random)
    features = KeyedJaggedTensor(list(SIZES), torch.cat(ids), lengths=torch.ones(2 * BATCH, dtype=torch.int64))
    return Batch(torch.zeros(BATCH, 1), features, clicks)


if __name__ == "__main__":
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # shards of different values
    config = {"embedding_dim": DIM, "partitions": QuotientRemainder(num_collisions=4)}
    tables = [
        CompositionalEmbeddingBagConfig(name=f"t_{feature}", feature_names=[feature], num_embeddings=size, **config)
        for feature, size in SIZES.items()
    ]
    ebc = CompositionalEmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": 0.05})
    dlrm = DLRMTrain(DLRM(ebc, 1, [DIM], [32, 1], dense_device=device))
    model = DistributedModelParallel(dlrm, device=device, sharders=get_default_sharders())
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    pipeline = TrainPipelineSparseDist(model, torch.optim.Adagrad(dense.values(), lr=0.05), device)
    batches = (generated_batch(step * world_size + rank) for step in range(STEPS))  # others on each rank
    losses = torch.stack([pipeline.progress(batches)[0] for _ in range(STEPS)]) / world_size
    dist.all_reduce(losses)
    if rank == 0:
        print(model.plan)
        print(f"log loss of the first 20 steps {losses[:20].mean():.3f}, of the last 20 {losses[-20:].mean():.3f}")
    dist.destroy_process_group()
