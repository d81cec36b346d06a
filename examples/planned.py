"""Plans the tables of a large model for two nodes of eight H100s, on a machine that has neither.

Run: python examples/planned.py
It prints why full tables do not fit, the compression, and the plan of what is left: the estimated step, the memory of
the fullest rank, where each table lies and why. A job takes it: DistributedModelParallel(model, plan=plan, ...).
"""

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.types import PlannerError

from torchrec_qr import QuotientRemainder, compress_
from torchrec_qr.distributed import get_default_sharders
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named

SIZES = {"user": 3_000_000_000, "item": 200_000_000, "query": 40_000_000, "country": 250}


def full_model() -> torch.nn.Module:
    """Returns the tables on the meta device, where they have sizes and no values."""
    tables = [
        EmbeddingBagConfig(name=f"t_{feature}", feature_names=[feature], num_embeddings=size, embedding_dim=128)
        for feature, size in SIZES.items()
    ]
    return torch.nn.ModuleDict({"sparse": EmbeddingBagCollection(tables=tables, device=torch.device("meta"))})


if __name__ == "__main__":
    h100 = hardware_named("h100")
    planner = CompositionalEmbeddingShardingPlanner(
        h100.topology(world_size=16, local_world_size=8),
        batch_size=4096,
        hardware=h100,
        constraints={
            "t_user": ParameterConstraints(compute_kernels=["fused"]),  # in GPUs' memory, not in the host's
            "t_item": ParameterConstraints(sharding_types=["column_wise"], pooling_factors=[10.0]),  # ten ids a bag
        },
    )
    model = full_model()
    try:
        planner.plan(model, get_default_sharders())
    except PlannerError as error:
        print(f"Full tables: {error}\n")
    rules = {"t_user": QuotientRemainder(num_collisions=100)}
    print(f"{compress_(model, QuotientRemainder(num_collisions=4), tables=rules)}\n")
    estimated = planner.propose(model, get_default_sharders())
    print(estimated)
    plan = estimated.sharding_plan().get_plan_for_module("sparse")
    assert plan["t_item"].sharding_type == "column_wise"
    assert max(estimated.ranks.memory) < min(estimated.reserved)
