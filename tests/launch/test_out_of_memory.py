"""Out of memory, while placing and while stepping, names the tables, the bytes and what would fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from benchmarks.quality.feature_generation import FeatureGenerationEmbeddingBagCollection
from launch.config import Job
from launch.memory_errors import described, tables_named
from launch.model import Collection, build_model
from launch.parallel import Parallel, parallelize
from launch.task import TrainTask
from tests.launch.jobs import SMALL, refused, with_set
from torchrec_qr import CompositionalEmbeddingBagCollection
from torchrec_qr.cli.schema import build_tables, load

CPU = torch.device("cpu")
ROWS = 2**40  # in fp32 and 64 columns 256 TiB, more than a process has addresses for


def job(huge: bool, sharding_type: str) -> Job:
    """Tables ``qr`` and ``plain``, and a third that may be huge."""
    table = {"num_embeddings": 50, "embedding_dim": 64}
    partitions = {"kind": "hash", "rows": ROWS} if huge else {"kind": "hash", "rows": 30}
    tables = [
        {**table, "name": "qr", "partitions": {"kind": "quotient_remainder", "num_collisions": 7}},
        {**table, "name": "plain"},
        {**table, "name": "hash", "num_embeddings": ROWS if huge else 50, "partitions": partitions},
    ]
    names = [t["name"] for t in tables]
    constraint = {"sharding_types": [sharding_type], **({"min_partition": 8} if sharding_type == "column_wise" else {})}
    constraints = dict.fromkeys(names, constraint)
    given = {
        "data": {"features": names},
        "model": {"bottom_mlp": [8, 64], "embedding_dim": 64, "top_mlp": [8]},
        "tables": tables,
        "planner": {"hbm_gib": 1e9, "constraints": constraints},
        "optimizer": {"sparse": {"name": "sgd"}},
    }
    loaded: Job = load(Job, given)
    return loaded


def place(this: Job, collection: Collection = CompositionalEmbeddingBagCollection) -> Parallel:
    model = build_model(this.model, build_tables(this.tables, "."), CPU, collection)
    return parallelize(TrainTask(model, CPU), this, CPU)


def place_a_huge_one(rank: int, world_size: int, sharding_type: str) -> str:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        place(job(True, sharding_type))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)  # the library's, and then the allocator's
    assert "can't allocate memory" in str(caught.value.__cause__.__cause__)
    return f"{caught.value}\n{caught.value.__cause__}"


@pytest.mark.parametrize("sharding_type", ["table_wise", "data_parallel"])
def test_a_table_that_cannot_be_allocated_is_named(sharding_type: str) -> None:
    (text,) = run_ranks(place_a_huge_one, 1, sharding_type)
    job_says, library_says = text.split("\n")
    assert job_says.startswith(
        "rank 0, placing the model: out of memory: table 'hash', partition 0, 256.0 TiB wanted of cpu, which has "
    )
    assert "Tables of this rank, largest first, values alone: hash 256.0 TiB, plain 12.5 KiB, qr " in job_says
    for suggestion in ("planner.constraints", "compression", "num_embeddings", "train.batch_size", "torchrec-qr plan"):
        assert suggestion in job_says.partition("These would fit: ")[2]
    assert library_says.startswith(f"table 'hash', partition 0: {(ROWS, 64)} of float32 wants 256.0 TiB of cpu, which ")


def bytes_as_placed(rank: int, world_size: int) -> None:
    for sharding_type in ("table_wise", "row_wise", "column_wise", "data_parallel"):
        this = job(False, sharding_type)
        parallel = place(this)
        held = dict.fromkeys(parallel.held, 0)
        for name, value in parallel.model.state_dict().items():
            if "embedding_bags." not in name or "fingerprint" in name:
                continue
            table = name.partition("embedding_bags.")[2].partition(".")[0]
            pieces = [s.tensor for s in value.local_shards()] if hasattr(value, "local_shards") else [value]
            held[table] += sum(piece.numel() * piece.element_size() for piece in pieces)
        assert parallel.held == held, sharding_type
    parallel = place(job(False, "data_parallel"), FeatureGenerationEmbeddingBagCollection)
    total = sum(p.numel() * 4 for n, p in parallel.model.named_parameters() if "embedding_bags." in n)
    assert sum(parallel.held.values()) == total > 0


def test_the_bytes_of_each_table_are_those_that_the_rank_holds() -> None:
    run_ranks(bytes_as_placed, 2)


def fail_in_the_third_step(rank: int) -> None:
    forward, calls = TrainTask.forward, 0

    def failing(self: TrainTask, batch: Any) -> Any:
        nonlocal calls
        calls += not isinstance(batch, torch.fx.Proxy)
        if calls == 3:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
                "3.12 GiB is free."
            )
        return forward(self, batch)

    TrainTask.forward = failing  # type: ignore[method-assign]


def test_a_step_without_memory_ends_the_job_and_says_what_would_fit(tmp_path: Path) -> None:
    (text,) = refused(tmp_path, *with_set(*SMALL), "--traceback", world_size=1, prepare=fail_in_the_third_step)
    assert "OutOfMemoryError: rank 0, step 3: out of memory: 20.50 GiB wanted of cpu, which has " in text
    assert "largest first, values alone: cat_" in text
    assert "These would fit: more ranks; " in text
    assert "Tried to allocate 20.50 GiB" in text  # the cause is there, too


def test_few_of_many_tables_are_named() -> None:
    held = {f"t_{i}": (i + 1) << 20 for i in range(8)}
    text = described("step 1", RuntimeError("DefaultCPUAllocator: can't allocate memory"), held, "cpu")
    assert "step 1: out of memory: memory wanted of cpu. " in text
    assert "t_7 8.0 MiB, t_6 7.0 MiB, t_5 6.0 MiB, t_4 5.0 MiB, t_3 4.0 MiB, and 3 more; in all 36.0 MiB. " in text


def test_another_error_is_left_as_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^no such table$"), tables_named("step 1", {}, CPU):
        raise RuntimeError("no such table")
    with pytest.raises(IndexError), tables_named("step 1", {}, CPU):
        raise IndexError


def raised_on_rank(rank: int, world_size: int) -> str:
    with pytest.raises(torch.OutOfMemoryError) as caught, tables_named("step 7", {"t": 1024}, CPU):
        torch.empty(2**48, dtype=torch.uint8)
    assert dist.get_rank() == rank
    return str(caught.value)


def test_the_rank_is_named() -> None:
    for rank, text in enumerate(run_ranks(raised_on_rank, 2)):
        assert text.startswith(f"rank {rank}, step 7: out of memory: 256.0 TiB wanted of cpu, which has ")
