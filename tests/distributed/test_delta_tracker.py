"""TorchRec's delta tracker reports the ids of plain tables, and refuses compositional ones, of which it has no rows."""

from typing import Any

import pytest
import torch
from global_batches import batch_of
from placements import plan_of
from ranks import run_ranks
from sharded_model import ROWWISE, Model, plain_named, sequences, sharders_of, table, two_tables
from single_tables import collection_of
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.model_tracker.model_delta_tracker import ModelDeltaTrackerTrec
from torchrec.distributed.model_tracker.types import TrackingMode
from torchrec.distributed.sharding_plan import table_wise
from torchrec.distributed.types import ShardingPlan

from torchrec_qr import QuotientRemainder

CPU = torch.device("cpu")


def distributed(
    models: dict[str, list[Any]], mode: TrackingMode, skipped: tuple[str, ...] = ()
) -> tuple[DistributedModelParallel, ModelDeltaTrackerTrec]:
    collections = {name: collection_of(configs, "meta") for name, configs in models.items()}
    sharders = sharders_of({"optimizer": ROWWISE, "learning_rate": 0.1})
    generate = table_wise(rank=0, compute_kernel="fused")
    plan = {}
    for name, collection in collections.items():
        sharder = next(s for s in sharders if s.module_type is type(collection))
        generators = {config.name: generate for config in models[name]}
        plan[f"{name}.collection"] = plan_of(collection, generators, sharder)
    model = DistributedModelParallel(
        nn.ModuleDict({name: Model(collection) for name, collection in collections.items()}),
        device=CPU,
        plan=ShardingPlan(plan),
        sharders=sharders,
    )
    return model, ModelDeltaTrackerTrec(model, mode=mode, fqns_to_skip=skipped)


def refused(rank: int, world_size: int) -> None:
    # TorchRec registers for optimizer state on the ranks that have rows alone: here rank 0.
    of_ids = [TrackingMode.ID_ONLY, TrackingMode.EMBEDDING]
    for mode in TrackingMode if rank == 0 else of_ids:
        for configs in ([*two_tables(), plain_named("p")], [sequences("a"), sequences("b")]):
            if mode == TrackingMode.EMBEDDING and configs[0].name == "a" and len(configs) == 3:
                continue  # TorchRec asserts that no tables are pooled.
            with pytest.raises(NotImplementedError, match=r"tables \['a', 'b'\]: TorchRec's delta tracker .*allowed"):
                distributed({"model": configs}, mode)


def test_compositional_tables_are_refused() -> None:
    run_ranks(refused, 2)


def tracked(rank: int, world_size: int) -> None:
    """A collection of plain tables beside a skipped one: the ids of the batch, under the table's name."""
    models = {"plain": [plain_named("p")], "compositional": [table("a", QuotientRemainder(num_collisions=7), "mult")]}
    model, tracker = distributed(models, TrackingMode.ID_ONLY, skipped=("compositional",))
    batch = batch_of(models["plain"], 0, rank, world_size)
    model.module["plain"](batch)
    unique = tracker.get_unique()
    ((name, rows),) = unique.items()
    assert name.endswith("plain.collection.embedding_bags.p")
    assert rows.ids.tolist() == batch.values().unique().tolist()


def test_plain_tables_are_tracked() -> None:
    run_ranks(tracked, 1)
