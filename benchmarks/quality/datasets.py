"""The study's data sets, each made once as MLPerf's binary files, in every order of ids that a cell needs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from benchmarks.quality.cells import Order
from launch.data import preprocess
from launch.data.errors import BadRows
from launch.data.generator import GeneratedRows
from launch.data.rows import Array
from launch.data.source import RowSource
from launch.data.split import boundaries
from launch.sections import CRITEO_FEATURES, GeneratorSection

_CRITEO, _MOVIELENS = "criteo_kaggle_137k.tsv.gz", "movielens_1m_ratings.parquet"
_GENERATOR_DENSE = 13
# Narrower than the paper's for the budget of a CPU, but for the cells that check what that changes.
_LAYERS = {
    "narrow": {"bottom_mlp": [128, 64, 16], "top_mlp": [256, 128]},
    "demo": {"bottom_mlp": [64, 16], "top_mlp": [128, 64]},
    "paper": {"bottom_mlp": [512, 256, 64, 16], "top_mlp": [512, 256]},
}


class _Generated(NamedTuple):
    """A generated data set: S and ids per row of each feature; rows; the generator's exponent and strength of ids."""

    sizes: list[int]
    ids_per_bag: list[int]
    rows: int = 200_000
    zipf: float = 1.1
    strength: float = 2.0


_GENERATED = {
    "multi_hot": _Generated([20_000, 15_000, 12_000, 100, 20], [10, 10, 10, 1, 1]),
    # Small and with much in its ids, for the regression check: far more than the seeds differ by.
    "check": _Generated([30_000, 20_000, 1000, 100], [1] * 4, rows=60_000, zipf=1.05, strength=3.0),
}


def _of_largest(ids: int) -> _Generated:
    return _Generated([ids, ids // 4, max(ids // 20, 12_000), 1000, 100, 20], [1] * 6)


class MissingDataError(RuntimeError):
    """A file of real data is not there, and nothing replaces it."""


@dataclass(frozen=True)
class DataSet:
    """A data set in one order of ids.

    Args:
        section: ``data:`` of a job.
        rows: S of each feature.
        model: keys of ``model:``.
        train: keys of ``train:``.
        rate: learning rate of Adagrad.
        natural: files of the features that have classes of their own.
        about: of the rows, for the results.
    """

    section: dict[str, Any]
    rows: dict[str, int]
    model: dict[str, Any]
    train: dict[str, Any]
    rate: float
    natural: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def data_set(name: str, order: Order, folder: Path, given: Path, layers: str | None = None) -> DataSet:
    """Returns a data set, whose files are made in ``folder`` where they are not there.

    Args:
        name: of `benchmarks.quality.cells.DATA`.
        order: of ids.
        folder: for files.
        given: folder of the real data.

    Raises:
        MissingDataError: the real data is not there.
    """
    prefix = folder / name
    if not Path(f"{prefix}_about.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _make(name, prefix, given)
    about = json.loads(Path(f"{prefix}_about.json").read_text())
    if order != "frequency":
        prefix = _reordered(prefix, order, list(about["rows"].values()))
    train_rows, rows = about["train_rows"], about["rows"]
    section: dict[str, Any] = {"format": "npy", "ids": "encoded", "features": list(rows)}
    if name == "movielens":
        files = {f"{part}_files": [f"{prefix}_{part}"] for part in ("train", "validation", "test")}
        section |= files | {"dense_features": 2}
        natural = {"pair": f"{prefix}_pair_classes.npy"}
        return DataSet(section, rows, _LAYERS["demo"], _train(train_rows, 512, 4), 0.02, natural, about)
    section |= {"files": [str(prefix)], "split": [6 / 7, 1 / 14, 1 / 14]}
    if name == "criteo":
        return DataSet(section, rows, _LAYERS[layers or "narrow"], _train(train_rows, 512, 1), 0.01, {}, about)
    return DataSet(section, rows, _LAYERS["demo"], _train(train_rows, 512, 1), 0.02, {}, about)


def _train(rows: int, batch_size: int, epochs: int) -> dict[str, Any]:
    """Validates twice an epoch, and ends at the first time that it is worse."""
    half = math.ceil(math.ceil(rows / batch_size) / 2)
    return {"batch_size": batch_size, "eval_batch_size": 8192, "epochs": epochs, "eval_every": half, "patience": 1}


def _make(name: str, prefix: Path, given: Path) -> None:
    about: dict[str, Any]
    if name == "criteo":
        about = _criteo(prefix, _found(given / _CRITEO))
    elif name == "movielens":
        about = _movielens(prefix, _found(given / _MOVIELENS))
    else:
        about = _generated(prefix, name.removeprefix("generator_"))
    Path(f"{prefix}_about.json").write_text(json.dumps(about, indent=1))


def _found(file: Path) -> Path:
    if not file.exists():
        raise MissingDataError(f"{file} is not there")
    return file


def _criteo(prefix: Path, file: Path) -> dict[str, Any]:
    if preprocess.main([str(file), "--out", str(prefix)]):
        raise MissingDataError(f"{file} is not to be read")
    with np.load(f"{prefix}_vocabulary.npz") as values:
        rows = {feature: len(values[feature]) + 1 for feature in CRITEO_FEATURES}
    train_rows, _ = boundaries(len(np.load(f"{prefix}_labels.npy", mmap_mode="r")), (6 / 7, 1 / 14, 1 / 14))
    return {"rows": rows, "train_rows": train_rows}


def _movielens(prefix: Path, file: Path) -> dict[str, Any]:
    """A tenth of the users; three folds train, one validates, one tests. A pair's id is user · items + item."""
    table = pq.read_table(file)
    user, item, rating, fold = (
        table[name].to_numpy().astype(np.int64) for name in ("user_id", "item_id", "rating", "fold")
    )
    kept = user % 10 == 0
    user, item, rating, fold = user[kept], item[kept], rating[kept], fold[kept]
    fold -= fold.min()
    train = fold < 3
    users, items = (_by_frequency(ids, train) for ids in (user, item))
    num_users, num_items = int(users.max()) + 1, int(items.max()) + 1
    ids = np.stack([users, items, users * num_items + items], axis=1)
    counts = [np.bincount(x[train], minlength=n) for x, n in ((users, num_users), (items, num_items))]
    dense = np.stack([counts[0][users], counts[1][items]], axis=1).astype(np.float32)
    for part, where in (("train", train), ("validation", fold == 3), ("test", fold == 4)):
        _save(Path(f"{prefix}_{part}"), dense[where], ids[where], rating[where] >= 4)
    pairs = np.arange(num_users * num_items)
    np.save(f"{prefix}_pair_classes.npy", np.stack([pairs // num_items, pairs % num_items]))
    rows = {"user": num_users, "item": num_items, "pair": num_users * num_items}
    return {"rows": rows, "train_rows": int(train.sum())}


def _by_frequency(values: Array, train: Array) -> Array:
    """Returns 1, 2, … by frequency in the train split, 0 for what it lacks."""
    found, counts = np.unique(values[train], return_counts=True)
    ids = np.zeros(int(values.max()) + 1, np.int64)
    ids[found[np.argsort(-counts, kind="stable")]] = np.arange(1, len(found) + 1)
    return ids[values]


def _generated(prefix: Path, kind: str) -> dict[str, Any]:
    """Ids by a power law, the most frequent first, whose effects on the logit are independent of one another."""
    generated = _GENERATED.get(kind) or _of_largest(int(float(kind)))
    section = GeneratorSection(rows=generated.rows, zipf=generated.zipf, ids_strength=generated.strength)
    file = GeneratedRows(section, generated.sizes, _GENERATOR_DENSE, generated.ids_per_bag)
    rows = RowSource([file]).read(0, generated.rows, BadRows("error"))
    _save(prefix, rows.dense, rows.ids, rows.labels, generated.ids_per_bag)
    train_rows, test = boundaries(generated.rows, (6 / 7, 1 / 14, 1 / 14))
    known = file.known_quality(test, generated.rows)
    return {"rows": {f"cat_{i}": s for i, s in enumerate(generated.sizes)}, "train_rows": train_rows, **known}


def _save(prefix: Path, dense: Array, ids: Array, labels: Array, ids_per_bag: Sequence[int] = ()) -> None:
    np.save(f"{prefix}_dense.npy", dense)
    np.save(f"{prefix}_labels.npy", labels.astype(np.int32))
    if any(hot > 1 for hot in ids_per_bag):
        ends = np.cumsum(ids_per_bag)
        numbered = {
            str(f): ids[:, e - h : e].astype(np.int32) for f, (e, h) in enumerate(zip(ends, ids_per_bag, strict=True))
        }
        np.savez(f"{prefix}_sparse_multi_hot.npz", **numbered)  # type: ignore[arg-type]
    else:
        np.save(f"{prefix}_sparse.npy", ids.astype(np.int32))


def _reordered(prefix: Path, order: Order, sizes: list[int]) -> Path:
    """Gives ids that are by frequency another order; 0, all unknown ones, stays. Returns the prefix of the files."""
    to = Path(f"{prefix}_{order}")
    if Path(f"{to}_sparse.npy").exists():
        return to
    ids = np.load(f"{prefix}_sparse.npy")
    for f, s in enumerate(sizes):
        new = np.arange(s)
        if order == "random":
            new[1:] = np.random.default_rng([0, f]).permutation(s - 1) + 1
        else:
            seen, first = np.unique(ids[:, f], return_index=True)
            by_first = seen[np.argsort(first)]
            by_first = by_first[by_first > 0]
            new[by_first] = np.arange(1, len(by_first) + 1)
        ids[:, f] = new[ids[:, f]]
    for part in ("dense", "labels"):
        Path(f"{to}_{part}.npy").symlink_to(Path(f"{prefix}_{part}.npy").resolve())
    np.save(f"{to}_sparse.npy", ids)
    return to
