"""A whole job keeps its ranks in step on uneven data: some have no row, no id, or a short last batch, and it evaluates.

See `poison_group`. With NCCL a rank that leaves out a collective, or issues another one, hangs all.
"""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from poison_jobs import Values, on_poison_as_on_gloo
from ranks import run_ranks
from test_waits_jobs import devices_of_nothing

from launch.config import Job
from launch.console import Output
from launch.data.loader import Data
from launch.data.meaning import Meaning
from launch.data.shards import num_batches, rank_range
from launch.data.split import open_splits
from launch.job_tables import job_tables
from launch.kept_meaning import agreed_meaning
from launch.model import build_model
from launch.run_folder import opened_by_all
from launch.train import trained
from launch.waits import Waits
from launch.weights import read_weights
from torchrec_qr.cli.schema import load

BATCH = 4
QR = {"partitions": {"kind": "quotient_remainder", "num_collisions": 3}, "operation": "mult"}
PLAIN: dict[str, Any] = {}
ADD, CONCAT = QR | {"operation": "add"}, QR | {"operation": "concat"}
# Features by the sharding type of their table, and what the table is.
ONE_NODE = {
    "tw": ("table_wise", QR),
    "rw": ("row_wise", ADD),
    "dp": ("data_parallel", QR),
    "plain_tw": ("table_wise", PLAIN),
    "plain_rw": ("row_wise", PLAIN),
    "plain_dp": ("data_parallel", PLAIN),
}
TWO_NODES = ONE_NODE | {"twrw": ("table_row_wise", QR), "rw_concat": ("row_wise", CONCAT)}
# Ranks, rows of the train split, and epochs. Rank 0 has no row in the last batch of an epoch, or none at all.
CASES = [
    pytest.param(3, 26, 2, ONE_NODE, id="a short last batch"),
    pytest.param(3, 2, 2, ONE_NODE, id="fewer rows than ranks", marks=pytest.mark.slow),
    pytest.param(4, 35, 1, TWO_NODES, id="two nodes", marks=pytest.mark.slow),
]


def rows(n: int, seed: int, features: dict[str, Any], world_size: int = 1) -> dict[str, Any]:
    """Columns of n rows with 0 to 3 ids a feature. Rank 1 has none, and a feature has none in the first rows."""
    random = np.random.default_rng(seed)
    without = range(*rank_range(0, n, 1, world_size)) if world_size > 1 else range(0)

    def ids_of(feature: str, row: int) -> list[int]:
        if row in without or (feature == "rw" and row < n // 2):
            return []
        return list(map(int, random.integers(0, 90, random.integers(0, 4))))

    ids = {name: [ids_of(name, i) for i in range(n)] for name in features}
    return {"label": [i % 2 for i in range(n)], "x": random.normal(size=n), **ids}


def in_order_of_batches(n: int, world_size: int) -> list[int]:
    """Returns the rows as the ranks have them, batch by batch."""
    parts = [range(*rank_range(0, n, rank, world_size)) for rank in range(world_size)]
    batches = num_batches(n, BATCH, world_size)
    return [i for k in range(batches) for part in parts for i in part[k * BATCH : (k + 1) * BATCH]]


def write(folder: Path, name: str, columns: dict[str, Any], order: list[int] | None = None) -> str:
    taken = {k: [v[i] for i in order or range(len(v))] for k, v in columns.items()}
    ids = {k: pa.array(v, pa.list_(pa.int64())) for k, v in taken.items() if k not in ("label", "x")}
    pq.write_table(pa.table({"label": taken["label"], "x": taken["x"], **ids}), folder / f"{name}.parquet")
    return str(folder / f"{name}.parquet")


def job_of(folder: Path, train_file: str, batch_size: int, features: dict[str, tuple[str, Any]], **train: Any) -> Job:
    sections: dict[str, Any] = {
        "data": {
            "format": "parquet",
            "features": list(features),
            "dense_features": 1,
            "dense_transform": "none",
            "parquet": {"label": "label", "dense": ["x"]},
            "train_files": [train_file],
            "validation_files": [str(folder / "validation.parquet")],
            "test_files": [str(folder / "test.parquet")],
            "shuffle": False,
        },
        "tables": [
            {"name": name, "num_embeddings": 90, "embedding_dim": 8, **of} for name, (_, of) in features.items()
        ],
        "planner": {"constraints": {name: {"sharding_types": [kind]} for name, (kind, _) in features.items()}},
        "model": {"embedding_dim": 8, "dense_in_features": 1, "bottom_mlp": [8], "top_mlp": [16]},
        "optimizer": {"sparse": {"name": "adagrad", "lr": 0.1}, "dense": {"name": "adagrad", "lr": 0.02}},
        "train": {
            "batch_size": batch_size,
            "eval_batch_size": 1,
            "log_every": 1,
            "eval_every": 2,
            "checkpoint_every": 2,
            **train,
        },
    }
    return load(Job, sections)


def to_the_end(rank: int, world_size: int, root: Path, job: Job) -> Values:
    """Trains, evaluates on the way, writes checkpoints and tests; returns all metrics, and the weights of the end."""
    run = root / f"{job.train.name}_{dist.get_backend()}"
    device = torch.device("cpu")
    torch.manual_seed(0)
    # A group of Python's has no time-outs that could be changed.
    with devices_of_nothing(), patch("launch.waits._set_everywhere"):
        waits = Waits(job.train, device)
        folder = opened_by_all(run, rank, waits.group)
        tables = job_tables(job, root)
        splits = open_splits(job.data, job.rows_of_features())
        meaning = agreed_meaning(job, folder, waits, lambda: Meaning.of_job(job, splits.train))
        data = Data(job, splits, meaning, rank, world_size)
        model = build_model(job.model, tables, device)
        trained(job, tables, model, data, folder, Output(rank, quiet=True), device, waits)
        folder.close()
        waits.meet()
    values = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for number in ("logloss", "auc", "calibration"):
            if line[number] is not None:
                values[f"{line['split']} {number} at step {line['step']}"] = torch.tensor(line[number]).double()
    return values | read_weights(run / "weights")[0]


@pytest.mark.parametrize(("world_size", "n", "epochs", "features"), CASES)
def test_ranks_keep_step_through_a_whole_job(
    world_size: int, n: int, epochs: int, features: dict[str, tuple[str, Any]], tmp_path: Path
) -> None:
    columns = rows(n, 0, features, world_size)
    for seed, name in enumerate(("validation", "test"), start=1):
        write(tmp_path, name, rows(2, seed, features))
    file = write(tmp_path, "train", columns)
    # All start from the same weights, which placed tables would otherwise draw in an order of their own.
    run_ranks(to_the_end, 1, tmp_path, job_of(tmp_path, file, n, features, name="start"))
    train = {"epochs": epochs, "init_from": str(tmp_path / "start_gloo")}
    found, *_ = on_poison_as_on_gloo(
        to_the_end, world_size, tmp_path, job_of(tmp_path, file, BATCH, features, name="ranks", **train)
    )

    # One rank on the same global batches.
    file = write(tmp_path, "in_order", columns, in_order_of_batches(n, world_size))
    alone = job_of(tmp_path, file, BATCH * world_size, features, name="alone", **train)
    (expected,) = run_ranks(to_the_end, 1, tmp_path, alone)
    assert found.keys() == expected.keys()
    steps = epochs * num_batches(n, BATCH, world_size)
    assert {f"validation logloss at step {step}" for step in range(2, steps + 1, 2)} <= found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-6)
