"""A small job on Parquet files, whose users have ids far beyond their table, so that the map to rows decides."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

USERS, SHOPS = 40, 20


def rows(n: int, seed: int, shift: int = 0) -> dict[str, Any]:
    """Columns of n rows; ``shift`` makes other users the frequent ones. The label depends on the user alone."""
    random = np.random.default_rng(seed)
    user = (np.minimum(random.zipf(1.5, n) - 1, USERS - 1) + shift) % USERS
    effect = 3 * np.random.default_rng(9).normal(size=USERS)
    label = (random.random(n) < 1 / (1 + np.exp(-effect[user]))).astype(np.int64)
    columns = {"price": random.normal(size=n), "user": user + 1000, "shop": random.integers(0, SHOPS, n)}
    return {"label": label, **columns}


def write(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def config(folder: Path, **data: Any) -> Path:
    """Writes the YAML of a job, ``data`` being keys of its section of data; files are ``folder``'s."""
    for key in ("files", "train_files", "validation_files", "test_files"):
        if key in data:
            data[key] = [str(folder / name) for name in data[key]]
    section = {
        "format": "parquet",
        "features": ["user", "shop"],
        "dense_features": 1,
        "dense_transform": "none",
        "parquet": {"label": "label", "dense": ["price"]},
        "split": [0.8, 0.1, 0.1],
        "ids": "vocabulary",
        **data,
    }
    partitions = {"kind": "quotient_remainder", "num_collisions": 4}
    job = {
        "data": section,
        "tables": [
            {"name": "user", "num_embeddings": 2000, "embedding_dim": 8, "partitions": partitions},
            {"name": "shop", "num_embeddings": 30, "embedding_dim": 8},
        ],
        "model": {"embedding_dim": 8, "dense_in_features": 1, "bottom_mlp": [16, 8], "top_mlp": [16]},
        "optimizer": {"sparse": {"name": "adagrad", "lr": 0.1}, "dense": {"name": "adagrad", "lr": 0.02}},
        "train": {"name": "t", "batch_size": 64, "log_every": 5, "checkpoint_every": 5, "eval_every": 5},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path
