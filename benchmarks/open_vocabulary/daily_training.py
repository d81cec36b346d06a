"""One run: each day is trained and the next one tested, by the job's own model, optimizers and metrics."""

import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from benchmarks.open_vocabulary.daily_rows import Day, Days
from benchmarks.open_vocabulary.id_fronts import IdFront
from benchmarks.open_vocabulary.open_methods import DIM, TABLE, method
from launch.config import Job
from launch.data.batch import Batch
from launch.job_tables import job_tables
from launch.metrics import quality
from launch.model import build_model
from launch.parallel import Parallel, parallelize
from launch.task import TrainTask
from torchrec_qr.cli.schema import load
from torchrec_qr.configs import stored_bytes, stored_shapes

BATCH, EVALUATED_AT_ONCE = 1024, 8192


def run(name: str, budget: int, days: Days, seed: int, rate: float) -> dict[str, Any]:
    """Trains day after day and returns the quality on each next day; a process group must be there.

    Args:
        name: of `benchmarks.open_vocabulary.open_methods.TITLES`.
        budget: bytes of the open table, its optimizer state and kept ids.
        days: the rows.
        seed: of weights, of the order of rows and of ``id_hash``.
        rate: learning rate of Adagrad.

    Raises:
        ImpossibleMethodError: see `method`.
    """
    began = time.process_time()
    chosen = method(name, budget, days, seed)
    job = _job(days, chosen.table, rate)
    random.seed(seed)
    torch.manual_seed(seed)
    device = torch.device("cpu")
    tables = job_tables(job, Path("/"))
    task = TrainTask(build_model(job.model, tables, device), device)
    parallel = parallelize(task, job, device)
    maker = _Batches(job.data.features, chosen.front, parallel)
    order = torch.Generator().manual_seed(seed)
    tested = []
    for today, next_day in zip(days.days[:-1], days.days[1:], strict=True):
        chosen.front.start(today)
        task.train()
        for rows in torch.randperm(len(today.labels), generator=order).split(BATCH):
            loss, _ = parallel.model(maker(today, rows, training=True))
            parallel.optimizer.zero_grad()
            loss.backward()
            parallel.optimizer.step()
        task.eval()
        tested.append(_tested(parallel, maker, next_day))
    table = next(config for config in tables if config.name == TABLE)
    return {
        "method": name,
        "budget": budget,
        "seed": seed,
        "rate": rate,
        "ids": table.num_embeddings,
        "rows": sum(shape.rows for shape in stored_shapes(table)),
        "logloss": [round(q.logloss, 6) for q in tested],
        "auc": [round(q.auc, 6) for q in tested],
        "table_bytes": stored_bytes(table),
        "training_bytes": 2 * stored_bytes(table) + chosen.front.kept_bytes,
        "kept_bytes": chosen.front.kept_bytes,
        "processor_seconds": round(time.process_time() - began, 1),
    }


class _Batches:
    """Makes batches of a day's rows, the raw ids of which go through a front."""

    def __init__(self, features: tuple[str, ...], front: IdFront, parallel: Parallel) -> None:
        self._features, self._front, self._parallel = list(features), front, parallel
        self._rows: Rows | None = None

    def __call__(self, day: Day, rows: Tensor, training: bool) -> Batch:
        raw = day.raw[rows].transpose(0, 1)
        ids = self._front(raw.flatten(0, 1), training)
        if (renewed := self._front.renewed()) is not None and training:
            self._rows = self._rows or Rows(self._parallel)
            self._rows.start_anew(renewed)
        closed = day.closed[rows].T.reshape(-1)
        lengths = torch.ones(len(self._features) * len(rows), dtype=torch.int32)
        lengths[len(closed) :] = raw.shape[2]
        sparse = KeyedJaggedTensor(self._features, torch.cat([closed, ids.reshape(-1)]), lengths=lengths)
        return Batch(day.dense[rows], sparse, day.labels[rows], torch.ones(len(rows)))


class Rows:
    """The rows of the open table and Adagrad's state of them, where TorchRec's kernel has these."""

    def __init__(self, parallel: Parallel) -> None:
        (key,) = (key for key in parallel.model.state_dict() if key.endswith(f".{TABLE}.weight"))
        states = parallel.model.fused_optimizer.state_dict()["state"]
        self.weight = _local(parallel.model.state_dict()[key])
        self.state = _local(states[key][f"{TABLE}.momentum1"])

    def start_anew(self, rows: Tensor) -> None:
        """Gives rows new first values and no state."""
        bound = len(self.weight) ** -0.5
        self.weight[rows] = torch.empty(len(rows), self.weight.shape[1]).uniform_(-bound, bound)
        self.state[rows] = 0


def _local(sharded: Any) -> Tensor:
    (shard,) = sharded.local_shards()
    return shard.tensor.detach()


@torch.no_grad()
def _tested(parallel: Parallel, maker: _Batches, day: Day) -> Any:
    logits = []
    for rows in torch.arange(len(day.labels)).split(EVALUATED_AT_ONCE):
        _, (predicted, _, _) = parallel.model(maker(day, rows, training=False))
        logits.append(predicted)
    return quality(torch.cat(logits), day.labels)


def _job(days: Days, table: dict[str, Any], rate: float) -> Job:
    first = days.days[0]
    closed = {f"closed_{c}": rows for c, rows in enumerate(days.closed_rows)}
    open_features = [f"{TABLE}_{f}" for f in range(first.raw.shape[1])]
    tables = [
        *({"name": name, "num_embeddings": rows, "embedding_dim": DIM} for name, rows in closed.items()),
        {"name": TABLE, "feature_names": open_features, "embedding_dim": DIM, **table},
    ]
    dense = first.dense.shape[1]
    optimizer = {"name": "adagrad", "lr": rate, "eps": 1e-10}
    return load(
        Job,
        {
            "data": {"features": [*closed, *open_features], "dense_features": dense},
            "tables": tables,
            "model": {
                "embedding_dim": DIM,
                "dense_in_features": dense,
                "bottom_mlp": [64, DIM],
                "top_mlp": [128, 64],
            },
            "optimizer": {"sparse": optimizer, "dense": optimizer},
            "train": {"batch_size": BATCH},
            # The plan does not change the result, and on one rank this one is the fastest.
            "planner": {"constraints": {entry["name"]: {"sharding_types": ["table_wise"]} for entry in tables}},
        },
    )
