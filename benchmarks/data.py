"""Rows per second from bytes to batches, per format, in one process: ``python -m benchmarks.data``.

It writes generated rows in each format to a temporary folder and reads them back, shuffled, as a training rank would.
"""

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import about
from launch.config import Job
from launch.data.errors import BadRows
from launch.data.generator import GeneratedRows
from launch.data.loader import open_data
from launch.data.rows import Rows
from launch.data.source import RowSource
from launch.sections import CRITEO_DENSE, CRITEO_FEATURES, GeneratorSection
from torchrec_qr.cli.schema import load

_TABLE_ROWS = 100_000


def main() -> None:
    """Measures every format and prints a line for each."""
    parser = argparse.ArgumentParser(prog="benchmarks.data", description=__doc__)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--tsv", type=Path, help="measures this file of Criteo's TSV besides")
    parser.add_argument("--json", type=Path, help="writes the figures to this file")
    arguments = parser.parse_args()
    section = GeneratorSection(rows=arguments.rows)
    generated = GeneratedRows(section, [_TABLE_ROWS] * len(CRITEO_FEATURES), CRITEO_DENSE)
    rows = RowSource([generated]).read(0, arguments.rows, BadRows("error"))
    with tempfile.TemporaryDirectory() as name:
        formats = dict(_written(Path(name), rows))
        formats["generator"] = {"format": "generator", "generator": {"rows": arguments.rows}}
        if arguments.tsv:
            formats[arguments.tsv.name] = {"format": "criteo_tsv", "files": [str(arguments.tsv)]}
        results = []
        for title, data in formats.items():
            opened, speed, fastest = _measured(data, arguments.batch_size)
            speeds = {"shuffled_rows_per_s": round(speed), "in_order_rows_per_s": round(fastest)}
            results.append({"format": title, "open_s": round(opened, 2), **speeds})
            print(f"{title:28} {speed:>12,.0f} rows/s; opening {opened:.2f} s; without shuffling {fastest:,.0f} rows/s")
    if arguments.json:
        sizes = {"rows": arguments.rows, "batch_size": arguments.batch_size}
        arguments.json.write_text(json.dumps({**about(), **sizes, "results": results}, indent=1) + "\n")


def _written(folder: Path, rows: Rows) -> Iterable[tuple[str, dict[str, Any]]]:
    lines = []
    for label, dense, ids in zip(rows.labels.tolist(), rows.dense.tolist(), rows.ids.tolist(), strict=True):
        numbers = ["" if x != x else str(int(x)) for x in dense]
        lines.append("\t".join([str(int(label)), *numbers, *(f"{x * 2654435761 % 2**32:08x}" for x in ids)]))
    text = ("\n".join(lines) + "\n").encode()
    (folder / "train.txt").write_bytes(text)
    yield "TSV", {"format": "criteo_tsv", "files": [str(folder / "train.txt")]}
    (folder / "train.txt.gz").write_bytes(gzip.compress(text, 6))
    yield "TSV, gzip", {"format": "criteo_tsv", "files": [str(folder / "train.txt.gz")]}
    np.save(folder / "npy_dense.npy", rows.dense)
    np.save(folder / "npy_labels.npy", rows.labels.astype(np.int32))
    np.save(folder / "npy_sparse.npy", rows.ids.astype(np.int32))
    yield "npy", {"format": "npy", "files": [str(folder / "npy")]}
    columns = {"label": rows.labels, **{f"int_{i}": rows.dense[:, i] for i in range(CRITEO_DENSE)}}
    columns |= {name: rows.ids[:, f] for f, name in enumerate(CRITEO_FEATURES)}
    pq.write_table(pa.table(columns), folder / "train.parquet")
    yield "Parquet", {"format": "parquet", "files": [str(folder / "train.parquet")]}


def _measured(data: dict[str, Any], batch_size: int) -> tuple[float, float, float]:
    """Returns seconds to open, rows per second shuffled, and in order."""
    speeds = []
    for shuffle in (True, False):
        tables = [{"name": name, "num_embeddings": _TABLE_ROWS, "embedding_dim": 16} for name in CRITEO_FEATURES]
        given = {"split": [0.9, 0.05, 0.05], "shuffle": shuffle, **data}
        model, train = {"bottom_mlp": [16]}, {"batch_size": batch_size}
        job = load(Job, {"data": given, "tables": tables, "model": model, "train": train})
        started = time.perf_counter()
        opened = open_data(job, rank=0, world_size=1)
        begun = time.perf_counter()
        count = sum(int(batch.weights.sum()) for batch in opened.train(0))
        speeds.append(count / (time.perf_counter() - begun))
    return begun - started, speeds[0], speeds[1]


if __name__ == "__main__":
    main()
