"""Loads a checkpoint under another plan and on one device: outputs stay the same, and training goes on as before.

Run: torchrun --nproc-per-node 2 examples/another_plan.py
Rows of tables are split in the first plan, columns in the second. It prints the greatest differences of outputs.
"""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.distributed.checkpoint import load

ON_GPUS = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if ON_GPUS else torch.device("cpu")
CONFIG = {"num_embeddings": 100_000, "embedding_dim": 16, "partitions": QuotientRemainder(num_collisions=100)}
TABLES = [CompositionalEmbeddingBagConfig(name=f"t_{f}", feature_names=[f], **CONFIG) for f in ("user", "item")]


def sharded(placement) -> DistributedModelParallel:
    ebc = CompositionalEmbeddingBagCollection(tables=TABLES, device=torch.device("meta"))
    apply_optimizer_in_backward(torch.optim.Adagrad, ebc.parameters(), {"lr": 0.1})
    sharder, placements = CompositionalEmbeddingBagCollectionSharder(), {"t_user": placement, "t_item": placement}
    plan = construct_module_sharding_plan(ebc, placements, sharder, device_type=DEVICE.type)
    return DistributedModelParallel(ebc, device=DEVICE, plan=ShardingPlan({"": plan}), sharders=[sharder])


def outputs(model: torch.nn.Module, step: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())  # other ids on each rank
    ids = torch.randint(100_000, (512,), generator=random)
    return model(KeyedJaggedTensor(["user", "item"], ids, lengths=torch.ones_like(ids)).to(DEVICE)).values()


if __name__ == "__main__":
    dist.init_process_group("nccl" if ON_GPUS else "gloo")
    first, second = sharded(row_wise()), sharded(column_wise(ranks=[0, dist.get_world_size() - 1]))
    for step in range(20):
        (outputs(first, step) - 1).square().sum().backward()
    dcp.save({"model": first, "optimizer": first.fused_optimizer}, checkpoint_id="runs/another_plan")
    load({"model": second, "optimizer": second.fused_optimizer}, checkpoint_id="runs/another_plan")
    whole = CompositionalEmbeddingBagCollection(tables=TABLES, device=DEVICE)
    load({"model": whole}, checkpoint_id="runs/another_plan", no_dist=True)
    differences = [(outputs(model, 0) - outputs(first, 0)).abs().max() for model in (second, whole)]
    for step in range(20, 40):
        (outputs(first, step) - 1).square().sum().backward()
        (outputs(second, step) - 1).square().sum().backward()
    differences.append((outputs(second, 0) - outputs(first, 0)).abs().max())
    if dist.get_rank() == 0:
        print("loaded: {:.6f} under another plan, {:.6f} on one device; trained further: {:.6f}".format(*differences))
    assert max(differences) < 1e-5
    dist.destroy_process_group()
