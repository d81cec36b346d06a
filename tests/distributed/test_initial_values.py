"""Ranks that hold the same rows start with the same values, also if the modules of the ranks have different ones."""

from typing import Any

import pytest
import torch
from pieces import Pieces, assembled, pieces_of
from placements import plan_of
from ranks import run_ranks
from sharded_model import own_weights
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import data_parallel, row_wise
from torchrec.distributed.types import ShardingPlan

from torchrec_qr import QuotientRemainder, compress_
from torchrec_qr.distributed import get_default_sharders

SPLIT_AND_COPIED = {"t_split": row_wise(), "t_copied": data_parallel()}
# A CPU has no data-parallel plain table of sequences.
TABLES = {"bags": {**SPLIT_AND_COPIED, "t_plain": data_parallel()}, "sequences": SPLIT_AND_COPIED}
KINDS = {"bags": (EmbeddingBagCollection, EmbeddingBagConfig), "sequences": (EmbeddingCollection, EmbeddingConfig)}


def start(rank: int, world_size: int, kind: str) -> tuple[dict[str, Pieces], dict[str, Pieces]]:
    """Returns the values of this rank's own collection, and those that this rank holds of the sharded one."""
    torch.manual_seed(rank)
    (collection, config), plans = KINDS[kind], TABLES[kind]
    tables: Any = [config(40, 8, name, feature_names=[f"f_{name}"]) for name in plans]
    model = nn.ModuleList([collection(tables=tables)])
    compress_(
        model,
        QuotientRemainder(num_collisions=4),
        min_rows=0,
        tables={name: None for name in plans if name == "t_plain"},
        fit=True,
    )
    own = {key: pieces_of(value) for key, value in model.named_parameters()}
    sharder = next(s for s in get_default_sharders() if s.module_type is type(model[0]))
    plan = ShardingPlan({"0": plan_of(model[0], plans, sharder)})
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])
    return own, own_weights(sharded)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_are_those_of_the_first_rank(kind: str) -> None:
    """Rows that are split come from the ranks that own them. Values are those of collections, so that none is drawn."""
    (first, _), (second, _) = given = run_ranks(start, 2, kind)
    values = assembled([sharded for _, sharded in given])
    assert {key.split(".", 2)[2] for key in values} == {
        *(f"{table}.partition_{j}.weight" for table in SPLIT_AND_COPIED for j in (0, 1)),
        *(f"{table}.weight" for table in TABLES[kind] if table == "t_plain"),
    }
    for key, value in values.items():
        own, other = assembled([{key: first[key]}])[key], assembled([{key: second[key]}])[key]
        assert not torch.equal(own, other)
        if key.endswith("t_split.partition_0.weight"):
            own[5:] = other[5:]
        assert torch.equal(value, own), key
