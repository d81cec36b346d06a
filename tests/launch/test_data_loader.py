"""Batches over ranks: every row once, equally many batches, an order that repeats, a position that resumes."""

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click_rows import FEATURES, NUM_DENSE, NUM_FEATURES, click_rows, job, tsv_lines, write_tsv

from launch.config import Job
from launch.data.deals import Deal, continued
from launch.data.errors import DataError
from launch.data.loader import Batch, Batches, Data, open_data
from launch.data.row_sums import RowSums
from launch.data.rows import MISSING
from torchrec_qr.cli.schema import dump, load

TRAIN, VALIDATION, N = 857, 929, 1000  # where validation and test begin


def write(folder: Path, kind: str) -> dict[str, Any]:
    """Writes 1,000 rows, the first id of each its number; returns the data section."""
    rows = click_rows(np.random.default_rng(0), N)
    if kind == "tsv":
        lines = tsv_lines(rows)
        write_tsv(folder / "day_2.gz", lines[:350])
        write_tsv(folder / "day_10.gz", lines[350:])
        return {"format": "criteo_tsv", "files": [str(folder / "day_*.gz")], "ids": "modulo"}
    if kind == "npy":
        np.save(folder / "a_dense.npy", rows.dense)
        np.save(folder / "a_labels.npy", rows.labels)
        np.save(folder / "a_sparse.npy", rows.ids)
        return {"format": "npy", "files": [str(folder / "a")], "ids": "encoded"}
    table = {"label": rows.labels, **{f"int_{i}": rows.dense[:, i] for i in range(NUM_DENSE)}}
    table |= {f"cat_{i}": rows.ids[:, i] for i in range(2, NUM_FEATURES)}
    table["cat_0"] = [[i] for i in range(N)]
    table["cat_1"] = [[7] * (i % 4) for i in range(N)]
    table |= {f"cat_{i}": np.maximum(rows.ids[:, i], 0) for i in range(2, NUM_FEATURES)}
    pq.write_table(pa.table(table), folder / "a.parquet", row_group_size=300)
    return {"format": "parquet", "files": [str(folder / "a.parquet")]}


def numbers(batches: Any) -> list[list[int]]:
    """The rows of each batch, by their first id; padding left out."""
    found = []
    for batch in batches:
        ids, lengths = batch.sparse["cat_0"].values().tolist(), batch.sparse["cat_0"].lengths().tolist()
        assert lengths == batch.weights.tolist()
        assert len(batch.labels) == len(batch.weights) == len(batch.dense)
        found.append(ids)
    return found


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def ranks(job: Job, world_size: int) -> list[Data]:
    return [open_data(job, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("kind", ["tsv", "npy", "parquet"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_together_have_every_row_once(tmp_path: Path, kind: str, world_size: int) -> None:
    all_ranks = ranks(job(write(tmp_path, kind)), world_size)
    for read, rows, per_batch in (
        (lambda d: d.train(0), range(TRAIN), 32),
        (lambda d: d.validation(), range(TRAIN, VALIDATION), 20),
        (lambda d: d.test(), range(VALIDATION, N), 20),
    ):
        of_rank = [numbers(read(data)) for data in all_ranks]
        assert sorted(i for batches in of_rank for i in flat(batches)) == list(rows)
        expected = math.ceil(math.ceil(len(rows) / world_size) / per_batch)
        assert [len(batches) for batches in of_rank] == [expected] * world_size
        assert max(len(flat(b)) for b in of_rank) - min(len(flat(b)) for b in of_rank) <= 1
    assert [data.batches_per_epoch for data in all_ranks] == [
        math.ceil(math.ceil(TRAIN / world_size) / 32)
    ] * world_size


def test_a_rank_without_rows_has_batches_all_the_same(tmp_path: Path) -> None:
    section = write(tmp_path, "tsv") | {"split": [0.998, 0.001, 0.001]}
    of_rank = [numbers(data.test()) for data in ranks(job(section), 3)]
    assert sorted(of_rank) == [[[]], [[]], [[999]]]


@pytest.mark.parametrize("kind", ["tsv", "npy"])
def test_order(tmp_path: Path, kind: str) -> None:
    section = write(tmp_path, kind)
    data = open_data(job(section), 0, 1)
    first, again, second = (flat(numbers(data.train(epoch))) for epoch in (0, 0, 1))
    assert first == again
    assert first != second
    assert first != sorted(first)
    assert flat(numbers(open_data(job(section, seed=1), 0, 1).train(0))) != first
    # Mixed within a window, and windows of the text in order.
    assert np.corrcoef(first[:300], range(300))[0, 1] < 0.3
    if kind == "tsv":
        assert sorted(first[:300]) == list(range(300))
    assert flat(numbers(data.validation())) == list(range(TRAIN, VALIDATION))
    assert flat(numbers(open_data(job(section | {"shuffle": False}), 0, 1).train(0))) == list(range(TRAIN))


@pytest.mark.parametrize("kind", ["tsv", "npy"])
def test_resumes_after_any_number_of_batches(tmp_path: Path, kind: str) -> None:
    section = write(tmp_path, kind)
    for rank in (0, 1):
        data = open_data(job(section), rank, 2)
        whole = numbers(data.train(1))
        for skip in (1, 5, 9, 10, 13, 14):
            assert numbers(data.train(1, [Deal(2, 32, skip)])) == whole[skip:]


# Ranks, rows of a batch, and how many batches are trained before the job goes on with other ranks. The split has 857.
HISTORIES = [
    [(8, 8, 5), (6, 8, 99)],
    [(3, 32, 2), (2, 32, 1), (5, 16, 3), (1, 64, 99)],
    [(2, 32, 0), (3, 32, 99)],
    [(4, 16, 2), (4, 32, 1), (4, 16, 99)],  # other batches for as many ranks
    [(2, 32, 14), (3, 32, 99)],  # all are trained
    [(2, 200, 2), (40, 2, 99)],
    [(3, 285, 1), (9, 2, 99)],  # two rows are left, and most ranks have none
]


@pytest.mark.parametrize(
    ("kind", "shuffle"), [pytest.param("tsv", True, marks=pytest.mark.slow), ("npy", True), ("npy", False)]
)
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_other_ranks_train_what_is_left(
    tmp_path: Path, kind: str, shuffle: bool, history: list[tuple[int, int, int]]
) -> None:
    section = write(tmp_path, kind) | {"shuffle": shuffle, "shuffle_rows": 100}
    deals: list[Deal] = []
    trained: list[int] = []
    sums = []
    for world_size, batch_size, batches in history:
        deals = continued(deals, world_size, batch_size)
        config = job(section, batch_size=batch_size)
        one = open_data(config, 0, 1)
        of_ranks = [Data(config, one.splits, one.meaning, rank, world_size) for rank in range(world_size)]
        left = of_ranks[0].batches_left(deals)
        for data in of_ranks:
            with data.train(1, deals) as made:
                of_rank = numbers(made)
            assert len(of_rank) == left
            assert all(len(batch) <= batch_size for batch in of_rank)
            trained += flat(of_rank[:batches])
            sums += made.sums[:batches]
        deals[-1] = Deal(world_size, batch_size, min(batches, left))
    assert sorted(trained) == list(range(TRAIN))
    assert RowSums.sum(sums) == RowSums.of_range(0, TRAIN)


def test_a_batch_holds_the_rows_of_the_file(tmp_path: Path) -> None:
    rows = click_rows(np.random.default_rng(0), N)
    section = write(tmp_path, "tsv") | {"missing_flags": True, "shuffle": False}
    tables = 1000
    config = load(Job, dump(job(section | {"missing_flags": False}, rows=tables)))
    with pytest.raises(ValueError, match=r"model.dense_in_features: 13; allowed: 26"):
        job(section)
    data = open_data(config, 0, 1)
    batch = next(iter(data.train(0, [Deal(1, 32, 2)])))
    assert isinstance(batch, Batch)
    part = slice(64, 96)
    assert batch.labels.tolist() == rows.labels[part].tolist()
    np.testing.assert_allclose(batch.dense, np.log1p(np.maximum(np.nan_to_num(rows.dense[part]), 0)), rtol=1e-6)
    for f, feature in enumerate(FEATURES):
        expected = [0 if x == MISSING else x % tables for x in rows.ids[part, f].tolist()]
        assert batch.sparse[feature].values().tolist() == expected
        assert batch.sparse[feature].lengths().tolist() == [1] * 32
    assert batch.sparse.values().dtype == torch.int64
    assert batch.sparse.lengths().dtype == torch.int32
    moved = batch.to(torch.device("cpu"))
    assert moved.sparse.keys() == FEATURES


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_batches_are_pinned_for_a_gpu(tmp_path: Path, kind: str, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of each batch, those of rows that pad it too; ids are counted before that."""
    addresses = set()

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        addresses.add(copy.data_ptr())
        return copy

    # There is no pinned memory without a GPU.
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    batches = list(open_data(job(write(tmp_path, kind)), 0, 1, pinned=pinned).train(0))
    for batch in batches:
        tensors = (batch.dense, batch.labels, batch.weights, batch.sparse.values(), batch.sparse.lengths())
        assert {tensor.data_ptr() in addresses for tensor in tensors} == {pinned}
        assert batch.sparse.length_per_key_or_none() == [batch.sparse[f].values().numel() for f in FEATURES]
    assert sorted(flat(numbers(batches))) == list(range(TRAIN))


def test_lists_have_their_own_lengths(tmp_path: Path) -> None:
    data = open_data(job(write(tmp_path, "parquet")), 0, 1)
    for batch in data.train(0):
        number, weights = batch.sparse["cat_0"].to_dense(), batch.weights
        expected = [int(n[0]) % 4 if w else 0 for n, w in zip(number, weights, strict=True)]
        assert batch.sparse["cat_1"].lengths().tolist() == expected
        assert set(batch.sparse["cat_1"].values().tolist()) == {7}


def test_skipped_rows_count_for_nothing(tmp_path: Path) -> None:
    section = write(tmp_path, "tsv") | {"on_bad_row": "skip"}
    lines = tsv_lines(click_rows(np.random.default_rng(0), 350))
    lines[7], lines[300] = "broken", "2" + lines[300][1:]
    file = write_tsv(tmp_path / "day_2.gz", lines)
    found = []
    for data in ranks(job(section), 2):
        batches = data.train(0)
        found += flat(numbers(batches))
        if batches.bad_rows.count:
            assert (batches.bad_rows.count, batches.bad_rows.first) == (2, f"{file}:8: 1 columns; allowed: 40")
    assert sorted(found) == [i for i in range(TRAIN) if i not in (7, 300)]

    with pytest.raises(DataError, match=r"day_2.gz:8: 1 columns; allowed: 40"):
        list(open_data(job(section | {"on_bad_row": "error"}), 0, 1).train(0))


def test_split_by_file(tmp_path: Path) -> None:
    lines = tsv_lines(click_rows(np.random.default_rng(0), 30))
    a, b, c = (
        str(write_tsv(tmp_path / name, part))
        for name, part in (("a", lines[:10]), ("b", lines[10:19]), ("c", lines[19:]))
    )
    by_file = {"format": "criteo_tsv", "train_files": [a], "validation_files": [b]}
    data = open_data(job(by_file | {"test_files": [c]}), 0, 1)
    passes = [sorted(flat(numbers(batches))) for batches in (data.train(0), data.validation(), data.test())]
    assert passes == [list(range(10)), list(range(10, 19)), list(range(19, 30))]
    halved = open_data(job(by_file), 0, 1)
    assert [flat(numbers(halved.validation())), flat(numbers(halved.test()))] == [
        list(range(10, 15)),
        list(range(15, 19)),
    ]


def test_a_vocabulary_is_built_from_the_train_split_alone(tmp_path: Path) -> None:
    rows = click_rows(np.random.default_rng(0), N)
    rows.ids[:, 1] = np.arange(N) // 300  # 300 rows each, of which 257 of value 2 are trained on; 3 is never seen
    file = write_tsv(tmp_path / "train.txt", tsv_lines(rows))
    section = {"format": "criteo_tsv", "files": [str(file)], "ids": "vocabulary", "shuffle": False}
    for world_size in (1, 2):
        train = [b for data in ranks(job(section), world_size) for b in data.train(0)]
        ids = torch.cat([b.sparse["cat_1"].values() for b in train])
        assert ids.tolist() == [1] * 300 + [2] * 300 + [3] * 257
        test = torch.cat([b.sparse["cat_1"].values() for b in open_data(job(section), 0, 1).test()])
        assert test.tolist() == [0] * (N - VALIDATION)


def test_files_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"day_\*.gz: no file matches"):
        open_data(job({"format": "criteo_tsv", "files": [str(tmp_path / "day_*.gz")]}), 0, 1)
    file = write_tsv(tmp_path / "a", tsv_lines(click_rows(np.random.default_rng(0), 2)))
    with pytest.raises(DataError, match=r"a: 2 rows leave none for validation, cut by data.split=\["):
        open_data(job({"format": "criteo_tsv", "files": [str(file)]}), 0, 1)


def test_batches_ahead_are_bounded_and_errors_arrive_in_their_place() -> None:
    made = []
    reached = threading.Event()

    def make() -> Any:
        for i in range(100):
            made.append(i)
            if i == 5:
                reached.set()
            yield i

    ahead: Batches = Batches(make, depth=5)  # type: ignore[arg-type]
    reached.wait(10)
    assert len(made) <= 6
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    ahead.close()
    assert list(ahead) == []
    assert len(made) < 100

    def fail() -> Any:
        yield 1
        raise DataError("file:2", "broken")

    broken: Batches = Batches(fail, depth=5)  # type: ignore[arg-type]
    assert next(broken) == 1
    with pytest.raises(DataError, match="file:2: broken"):
        next(broken)
    assert list(broken) == []


def test_waiting_is_measured() -> None:
    go = threading.Event()

    def make() -> Any:
        go.wait(10)
        yield 1

    batches: Batches = Batches(make, depth=1)  # type: ignore[arg-type]
    timer = threading.Timer(0.2, go.set)
    timer.start()
    assert list(batches) == [1]
    assert 0.1 < batches.wait_seconds < 5
