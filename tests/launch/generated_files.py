"""Rows of the demo's generator in a Parquet file, whose columns have the names that a config expects."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from launch.config import read_job
from launch.data.generator import GeneratedRows
from launch.data.rows import concat
from launch.sections import GeneratorSection
from tests.launch.jobs import DEMO


def write_generated(path: Path, num_rows: int) -> Path:
    """Writes ``label``, ``int_<i>`` and ``cat_<i>`` of the rows that the demo trains on."""
    job = read_job(DEMO)
    section = GeneratorSection(rows=num_rows, seed=job.data.generator.seed)
    generated = GeneratedRows(section, job.rows_of_features(), job.data.dense_features)
    rows = concat([part for part, _ in generated.blocks(0)])
    columns = {"label": rows.labels.astype("int64")}
    columns |= {f"int_{i}": rows.dense[:, i] for i in range(rows.dense.shape[1])}
    columns |= {f"cat_{i}": rows.ids[:, i] for i in range(rows.ids.shape[1])}
    pq.write_table(pa.table(columns), path)
    return path
