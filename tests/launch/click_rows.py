"""Small click logs that the tests write to files."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from launch.config import Job
from launch.data.rows import MISSING, Rows
from torchrec_qr.cli.schema import load

NUM_DENSE, NUM_FEATURES = 13, 26
FEATURES = [f"cat_{i}" for i in range(NUM_FEATURES)]


def click_rows(random: Generator, n: int, missing: float = 0.2) -> Rows:
    """Rows in Criteo's form; the first id of row i is i, by which tests recognise it."""
    dense = np.floor(random.normal(5, 20, (n, NUM_DENSE))).astype(np.float32)
    dense[random.random(dense.shape) < missing] = np.nan
    ids = random.integers(0, 2**32, (n, NUM_FEATURES))
    ids[random.random(ids.shape) < missing] = MISSING
    ids[:, 0] = np.arange(n)
    return Rows(random.integers(0, 2, n).astype(np.float32), dense, ids, (1,) * NUM_FEATURES)


def tsv_lines(rows: Rows) -> list[str]:
    return [
        "\t".join(
            [
                str(int(rows.labels[i])),
                *("" if np.isnan(x) else str(int(x)) for x in rows.dense[i]),
                *("" if x == MISSING else f"{x:08x}" for x in rows.ids[i].tolist()),
            ]
        )
        for i in range(len(rows))
    ]


def write_tsv(path: Path, lines: list[str], end: str = "\n") -> Path:
    """Writes the lines, gzip-compressed if the name ends so."""
    text = (end.join(lines) + end).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def assert_same_rows(given: Rows, expected: Rows) -> None:
    assert given.ids_per_row == expected.ids_per_row
    for name in ("labels", "dense", "ids", "lengths", "weights"):
        a, b = getattr(given, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=name)


def job(data: dict[str, Any], batch_size: int = 32, rows: int = 2**32, **train: Any) -> Job:
    """A job on such rows, each of whose tables has so many rows."""
    sections = {
        "data": {"shuffle_rows": 300, "prefetch": 3, **data},
        "model": {"bottom_mlp": [16]},
        "tables": [{"name": feature, "num_embeddings": rows, "embedding_dim": 16} for feature in FEATURES],
        "train": {"batch_size": batch_size, "eval_batch_size": 20, **train},
    }
    return load(Job, sections)
