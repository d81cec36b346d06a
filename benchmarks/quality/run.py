"""One run of the study: a cell with a seed, trained by the job's own trainer in this process."""

import json
import random
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagConfig

from benchmarks.quality.cells import Cell
from benchmarks.quality.datasets import DataSet, data_set
from benchmarks.quality.feature_generation import FeatureGenerationEmbeddingBagCollection
from benchmarks.quality.method_tables import DIM, parameters_of, tables_of
from benchmarks.quality.pool_first import PoolFirstEmbeddingBagCollection
from launch.config import Job
from launch.console import Output
from launch.data.loader import open_data
from launch.job_tables import job_tables
from launch.model import Collection, build_model
from launch.run_folder import RunFolder
from launch.train import trained
from launch.waits import Waits
from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig
from torchrec_qr.cli.schema import load
from torchrec_qr.configs import stored_shapes

_AMSGRAD_RATE = 1e-3  # PyTorch's default, as in the paper
_EPS = 1e-10
_COLLECTIONS: dict[str, Collection] = {
    "feature_generation": FeatureGenerationEmbeddingBagCollection,
    "pool_first": PoolFirstEmbeddingBagCollection,
}


def run(cell: Cell, seed: int, folder: Path, given: Path, device: torch.device) -> dict[str, Any]:
    """Trains a cell and returns its numbers; a process group must be there.

    Raises:
        ImpossibleCellError: there is no such cell.
        MissingDataError: its data is not there.
    """
    data = data_set(cell.data, cell.order, folder, given, cell.layers)
    tables = tables_of(cell, data.rows, data.natural)
    job = load(Job, _job(cell, data, tables, seed))
    random.seed(seed)
    torch.manual_seed(seed)
    configs = [_initialised(cell, config) for config in job_tables(job, Path("/"))]
    opened = open_data(job, rank=0, world_size=1)
    model = build_model(job.model, configs, device, _COLLECTIONS.get(cell.method, CompositionalEmbeddingBagCollection))
    waits = Waits(job.train, device)
    with tempfile.TemporaryDirectory() as root:
        runs = RunFolder(Path(root) / "run", rank=0)
        try:
            trainer, test = trained(job, configs, model, opened, runs, Output(rank=1, quiet=True), device, waits)
        finally:
            runs.close()
        lines = [json.loads(line) for line in (runs.root / "metrics.jsonl").read_text().splitlines()]
    validations = [(line["step"], line["logloss"]) for line in lines if line["split"] == "validation"]
    best_step, best = min(validations, key=lambda pair: pair[1])
    logical, stored = sum(data.rows.values()) * DIM, sum(map(parameters_of, tables))
    return {
        "cell": asdict(cell),
        "seed": seed,
        "logloss": test.logloss,
        "auc": test.auc,
        "ne": test.ne,
        "validation_logloss": best,
        "best_epoch": round(best_step / opened.batches_per_epoch, 2),
        "parameters": stored,
        "compression": round(logical / stored, 3),
        "rows": sum(shape.rows for config in configs for shape in stored_shapes(config)),
        "mib": round(4 * stored / 2**20, 3),
        "cpu_ms_per_step": round(trainer.speed.cpu_us_per_sample * job.train.batch_size / 1000, 2),
    }


def _job(cell: Cell, data: DataSet, tables: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    amsgrad = cell.optimizer == "amsgrad"
    rate = _AMSGRAD_RATE if amsgrad else data.rate
    dense = data.section.get("dense_features", 13)
    model = {"embedding_dim": DIM, "dense_in_features": dense, **data.model}
    sparse = {"name": cell.optimizer, "lr": rate * cell.lr_factor, "eps": _EPS}
    optimizer = {"sparse": sparse, "dense": {"name": "amsgrad" if amsgrad else "adagrad", "lr": rate, "eps": _EPS}}
    epochs = {} if cell.epochs is None else {"epochs": cell.epochs}
    train = {**data.train, **epochs, "seed": seed, "log_every": 1_000_000}
    # The plan does not change the result, and on one rank this one is the fastest.
    constraints = {table["name"]: {"sharding_types": ["table_wise"]} for table in tables}
    sections = {"data": data.section, "tables": tables, "model": model, "optimizer": optimizer, "train": train}
    return {**sections, "planner": {"constraints": constraints}}


def _initialised(cell: Cell, config: EmbeddingBagConfig) -> EmbeddingBagConfig:
    if not isinstance(config, CompositionalEmbeddingBagConfig) or config.num_partitions == 1:
        return config
    if cell.init != "dlrm":
        return replace(config, init=cell.init)
    # The reference passes √(1/S) where it means a bound on both sides.
    return replace(config, init_fn=partial(nn.init.uniform_, a=config.num_embeddings**-0.5, b=1.0))
