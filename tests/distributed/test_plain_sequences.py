"""Plain tables without pooling on a CPU: FBGEMM's dense kernel pools them there, so no plan may have it."""

from typing import Any

import pytest
import torch
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise, table_wise

from torchrec_qr import CompositionalEmbeddingCollection
from torchrec_qr.distributed import CompositionalEmbeddingCollectionSharder
from torchrec_qr.distributed.logical_tables import check_plain_tables
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named


def tables() -> list[EmbeddingConfig]:
    return [EmbeddingConfig(name="p", feature_names=["f"], num_embeddings=9, embedding_dim=8)]


def check(generator: Any, device: str) -> None:
    module = CompositionalEmbeddingCollection(tables=tables(), device=torch.device("meta"))
    sharder = CompositionalEmbeddingCollectionSharder()
    plan = construct_module_sharding_plan(
        module,
        {"p": generator},
        sharder,  # type: ignore[arg-type]
        local_size=1,
        world_size=1,
        device_type=device,
    )
    check_plain_tables(tables(), plan, sharder.shardable_parameters(module), torch.device(device))


@pytest.mark.parametrize(
    ("generator", "sharding_type"),
    [
        (table_wise(rank=0), "table_wise"),
        (row_wise(), "row_wise"),
        (data_parallel(), "data_parallel"),
    ],
)
def test_the_dense_kernel_is_refused_on_a_cpu(generator: Any, sharding_type: str) -> None:
    match = rf"table 'p': compute kernel 'dense' \({sharding_type}\) .* CPU.*'fused'.*MixedRadix\(sizes=\[9\]\)"
    with pytest.raises(NotImplementedError, match=match):
        check(generator, "cpu")
    check(generator, "cuda")
    if sharding_type != "data_parallel":
        check(table_wise(rank=0, compute_kernel="fused"), "cpu")


@pytest.mark.parametrize("ours", [True, False])
def test_no_plan_has_it_on_a_cpu(ours: bool) -> None:
    made: Any = CompositionalEmbeddingCollection if ours else EmbeddingCollection
    sharder: Any = CompositionalEmbeddingCollectionSharder() if ours else EmbeddingCollectionSharder()
    model = made(tables=tables(), device=torch.device("meta"))

    def sharding_types(device: str) -> set[str]:
        planner = CompositionalEmbeddingShardingPlanner(hardware_named(device).topology(2))
        return {option.sharding_type for option in planner.propose(model, [sharder]).tables[0].choices}

    assert "data_parallel" not in sharding_types("cpu")
    assert "data_parallel" in sharding_types("h100")
    only = {"p": ParameterConstraints(sharding_types=["data_parallel"])}
    with pytest.raises(PlannerError, match=r"table 'p'.*without pooling cannot be data_parallel on a CPU"):
        CompositionalEmbeddingShardingPlanner(hardware_named("cpu").topology(2), constraints=only).plan(
            model, [sharder]
        )
