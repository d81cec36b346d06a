"""npy, npz and Parquet: the rows that were written come back, from any range, and malformed files are errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click_rows import FEATURES, NUM_DENSE, NUM_FEATURES, assert_same_rows, click_rows

from launch.data.errors import BadRows, DataError
from launch.data.id_values import ALLOWED_TYPES
from launch.data.npy import npy_source
from launch.data.parquet import ParquetFile
from launch.data.rows import MISSING, Rows
from launch.data.source import RowSource
from launch.data.validity import BINARY, Labels
from launch.sections import ParquetSection

SHARED = Path(__file__).parents[3] / "shared" / "data"
DENSE = [f"int_{i}" for i in range(NUM_DENSE)]


def write_npy(prefix: Path, rows: Rows) -> str:
    np.save(f"{prefix}_dense.npy", rows.dense)
    np.save(f"{prefix}_labels.npy", rows.labels.astype(np.int32)[:, None])
    np.save(f"{prefix}_sparse.npy", rows.ids.astype(np.int64))
    return str(prefix)


def write_multi_hot(prefix: Path, rows: Rows, save: Any = np.savez) -> str:
    np.save(f"{prefix}_dense.npy", rows.dense)
    np.save(f"{prefix}_labels.npy", rows.labels)
    ends = np.cumsum(rows.ids_per_row)
    save(
        f"{prefix}_sparse_multi_hot.npz",
        **{str(f): rows.ids[:, e - h : e] for f, (e, h) in enumerate(zip(ends, rows.ids_per_row, strict=True))},
    )
    return str(prefix)


def test_npy_of_several_files(tmp_path: Path) -> None:
    rows = click_rows(np.random.default_rng(0), 100)
    prefixes = [write_npy(tmp_path / "day_0", rows.cut(0, 30)), write_npy(tmp_path / "day_1", rows.cut(30, 100))]
    source = npy_source(prefixes, NUM_FEATURES, NUM_DENSE)
    assert source.num_rows == 100
    for start, stop in [(0, 100), (10, 20), (29, 31), (50, 100)]:
        assert_same_rows(source.read(start, stop, BadRows("error")), rows.cut(start, stop))
    assert source.location(30) == f"{tmp_path / 'day_1'}:1"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_multi_hot_npz(tmp_path: Path, save: Any) -> None:
    random = np.random.default_rng(0)
    rows = Rows(
        np.float32([1, 0, 1]), random.random((3, 2), np.float32), random.integers(0, 9, (3, 6), np.int32), (3, 1, 2)
    )
    prefix = write_multi_hot(tmp_path / "day_0", rows, save)
    source = npy_source([prefix], 3, 2, ids_per_row=(3, 1, 2))
    assert_same_rows(source.read(1, 3, BadRows("error")), rows.cut(1, 3))
    with pytest.raises(DataError, match=r"day_0: \[3, 1, 2\] ids per feature; allowed: \[3, 2, 2\], as data.multi_hot"):
        npy_source([prefix], 3, 2, ids_per_row=(3, 2, 2))
    with pytest.raises(DataError, match=r"day_0_sparse_multi_hot.npz: no array 3; it has 0, 1, 2"):
        npy_source([prefix], 4, 2)


def test_npy_files_that_cannot_be_used(tmp_path: Path) -> None:
    rows = click_rows(np.random.default_rng(0), 10)
    prefix, file = write_npy(tmp_path / "a", rows), tmp_path / "a_sparse.npy"

    def refuses(problem: str, prefix: str = prefix, features: int = NUM_FEATURES, dense: int = NUM_DENSE) -> None:
        with pytest.raises(DataError, match=problem):
            npy_source([prefix], features, dense).read(0, 10, BadRows("error"))

    refuses(r"b_dense.npy: no such file", prefix=str(tmp_path / "b"))
    refuses(r"a_dense.npy: shape \(10, 13\); allowed: \(10, 12\)", dense=12)
    refuses(r"a_sparse.npy: shape \(10, 26\); allowed: \(10, 25\)", features=25)
    file.write_bytes(file.read_bytes()[:-1])
    refuses(r"a_sparse.npy: not npy, or corrupt")
    np.save(file, rows.ids.astype(np.float32))
    refuses(r"a_sparse.npy: type float32; allowed: integers")
    write_npy(tmp_path / "a", rows)
    np.save(tmp_path / "a_labels.npy", np.array([0, 1, 0, 0, 7, 0, 0, 0, 0, 1]))
    refuses("a:5: label is 7; allowed: 0, 1")
    assert npy_source([prefix], NUM_FEATURES, NUM_DENSE).read(3, 6, BadRows("skip")).weights.tolist() == [1, 0, 1]  # type: ignore[union-attr]
    rows.dense[2, 4] = np.inf
    write_npy(tmp_path / "a", rows)
    refuses("a:3: dense 4 is inf; allowed: a finite number or nothing")


def test_npy_files_without_rows_are_left_out(tmp_path: Path) -> None:
    rows = click_rows(np.random.default_rng(0), 10)
    prefixes = [write_npy(tmp_path / "a", rows.cut(0, 0)), write_npy(tmp_path / "b", rows)]
    source = npy_source(prefixes, NUM_FEATURES, NUM_DENSE)
    assert (source.empty, source.num_rows, source.location(0)) == ([prefixes[0]], 10, f"{prefixes[1]}:1")
    with pytest.raises(DataError, match=r"/a: empty"):
        npy_source(prefixes[:1], NUM_FEATURES, NUM_DENSE)


def test_npy_labels_by_threshold_and_ids_of_64_bits(tmp_path: Path) -> None:
    rows = click_rows(np.random.default_rng(0), 3)
    prefix = write_npy(tmp_path / "a", rows)
    np.save(tmp_path / "a_labels.npy", np.float32([1, 3.5, 5]))
    ids = np.full((3, NUM_FEATURES), 2**64 - 5, np.uint64)
    np.save(tmp_path / "a_sparse.npy", ids)
    source = npy_source([prefix], NUM_FEATURES, NUM_DENSE, labels=Labels(above=3.5))
    read = source.read(0, 3, BadRows("error"))
    assert read.labels.tolist() == [0, 0, 1]
    assert set(read.ids.reshape(-1).tolist()) == {-5}
    assert source.quoted(0, 3) == str(2**64 - 5)


@pytest.mark.parametrize("other", [np.int64, np.int32, np.uint32, ">u8"])
def test_multi_hot_ids_of_several_types_stay_integers(tmp_path: Path, other: Any) -> None:
    prefix = tmp_path / "a"
    rows = Rows(np.float32([0, 1]), np.zeros((2, NUM_DENSE), np.float32), np.zeros((2, 2), np.int64), (1, 1))
    write_multi_hot(prefix, rows)
    large = np.array([[2**53 + 1], [2**64 - 1]], np.uint64)
    np.savez(f"{prefix}_sparse_multi_hot.npz", **{"0": large, "1": np.array([[5], [6]], other)})
    read = npy_source([prefix], 2, NUM_DENSE).read(0, 2, BadRows("error"))
    assert read.ids.dtype == np.int64
    assert read.ids.tolist() == [[2**53 + 1, 5], [-1, 6]]


def parquet_source(
    files: Sequence[Path], label: str, dense: Sequence[str], ids: Sequence[str], hexadecimal: Sequence[str] = ()
) -> RowSource:
    columns = ParquetSection(label, tuple(dense), tuple(ids), tuple(hexadecimal))
    return RowSource([ParquetFile(file, columns, BINARY) for file in files])


def parquet_table(rows: Rows, kind: str) -> pa.Table:
    columns: dict[str, Any] = {"label": rows.labels.astype(np.int32)}
    for i, name in enumerate(DENSE):
        columns[name] = pa.array(rows.dense[:, i], mask=np.isnan(rows.dense[:, i]))
    for f, name in enumerate(FEATURES):
        ids, missing = rows.ids[:, f], rows.ids[:, f] == MISSING
        if kind == "hex":
            columns[name] = pa.array([None if m else f"{x:08x}" for x, m in zip(ids.tolist(), missing, strict=True)])
        elif kind == "int32":  # the hash, read as signed
            columns[name] = pa.array(ids.astype(np.uint32).view(np.int32), mask=missing)
        else:
            columns[name] = pa.array(ids, mask=missing)
    return pa.table(columns)


@pytest.mark.parametrize("kind", ["hex", "int32", "int64"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    rows = click_rows(np.random.default_rng(0), 1000)
    files = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    pq.write_table(parquet_table(rows.cut(0, 400), kind), files[0], row_group_size=150)
    pq.write_table(parquet_table(rows.cut(400, 1000), kind), files[1])
    source = parquet_source(files, "label", DENSE, FEATURES, hexadecimal=FEATURES)
    for start, stop in [(0, 1000), (100, 350), (350, 700), (10, 20), (899, 1000)]:
        assert_same_rows(source.read(start, stop, BadRows("error")), rows.cut(start, stop))


def test_parquet_lists(tmp_path: Path) -> None:
    file = tmp_path / "lists.parquet"
    columns = {
        "label": [1, 0, 1],
        "x": [1.0, None, 3.0],
        "a": [[1, 2], None, []],
        "b": [5, None, 7],
        "c": [[3], [4, 5], [6]],
    }
    pq.write_table(pa.table(columns), file)
    rows = parquet_source([file], "label", ["x"], ["a", "b", "c"]).read(0, 3, BadRows("error"))
    assert rows.lengths is not None
    assert rows.lengths.tolist() == [[2, 1, 1], [0, 1, 2], [0, 1, 1]]
    assert rows.ids.tolist() == [1, 2, 5, 3, MISSING, 4, 5, 7, 6]


def test_parquet_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"

    def message(hexadecimal: tuple[str, ...] = (), **columns: Any) -> str:
        pq.write_table(pa.table({"label": [1, 0], "x": [1, 2], "a": ["ff", "1"], **columns}), file)
        with pytest.raises(DataError) as caught:
            parquet_source([file], "label", ["x"], ["a"], hexadecimal=hexadecimal).read(0, 2, BadRows("error"))
        return str(caught.value).removeprefix(str(file))

    assert message(label=[1, 2]) == ":2: label is 2; allowed: 0, 1"
    assert message(label=[None, 1]) == ":1: label is None; allowed: 0, 1"
    assert message(("a",), a=["ff", "xyz"]) == ":2: a is 'xyz'; allowed: 1 to 16 hexadecimal digits or nothing"
    assert message(("a",), a=[["ff"], ["1", "xyz"]]) == (
        ":2: a is ['1', 'xyz']; allowed: 1 to 16 hexadecimal digits or nothing"
    )
    assert message(a=[3, -(2**63)]) == (
        ":2: a is -9223372036854775808; allowed: an integer from -2^63 + 1 to 2^64 - 1 but 2^63, or nothing"
    )
    assert message(a=[2.0, 2.5]) == ":2: a is 2.5; allowed: an integer, of a float up to 2^53, or nothing"
    assert (
        message(a=[2.0**60, 2])
        == ":1: a is 1.152921504606847e+18; allowed: an integer, of a float up to 2^53, or nothing"
    )
    assert message(a=[{"b": 1}, {"b": 2}]) == f": column 'a' is of type struct<b: int64>; allowed: {ALLOWED_TYPES}"
    assert message(x=[1.0, np.inf]) == ":2: x is inf; allowed: a finite number or nothing"
    assert message(x=[1e300, 1.0]) == ":1: x is 1e+300; allowed: a finite number or nothing"
    assert message(x=["1", "2"]) == ": column 'x' is of type string; allowed: numbers"

    def refuses(problem: str, file: Path = file, dense: str = "x", ids: str = "a") -> None:
        with pytest.raises(DataError, match=problem):
            parquet_source([file], "label", [dense], [ids])

    refuses("column 'a' is of type string; allowed: numbers", dense="a")
    pq.write_table(pa.table([pa.array([1, 0])] * 4, names=["label", "x", "a", "a"]), file)
    refuses(r"a.parquet: 2 columns are called 'a'; allowed: one")
    pq.write_table(pa.table({"label": [1, 0], "x": [1, 2], "a": ["ff", "1"]}), file)
    refuses("no column 'b'; it has label, x, a", ids="b")
    refuses(r"none.parquet: no such file", file=tmp_path / "none.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    refuses(r"a.parquet: not Parquet, or corrupt")
    pq.write_table(pa.table({name: pa.array([], pa.int32()) for name in ("label", "x", "a")}), file)
    refuses(r"a.parquet: empty")


@pytest.mark.skipif(not SHARED.exists(), reason="the real Criteo sample is not beside this checkout")
def test_real_parquet() -> None:
    source = parquet_source([SHARED / "criteo_1tb_32768.parquet"], "label", DENSE, FEATURES, hexadecimal=FEATURES)
    rows = source.read(0, source.num_rows, BadRows("error"))
    assert len(rows) == 32_768
    assert rows.labels.mean() == pytest.approx(0.0284, abs=1e-4)
    distinct = [len(np.unique(column[column != MISSING])) for column in rows.ids.T]
    assert distinct[19] == 8_520
    assert sum(distinct) == 76_692
    values, counts = np.unique(rows.ids[:, 5], return_counts=True)
    assert f"{values[counts.argmax()]:08x}" == "6fcd6dcb"


def test_a_parquet_file_that_changes_is_an_error(tmp_path: Path) -> None:
    files = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    for file, n in zip(files, (10, 5), strict=True):
        pq.write_table(pa.table({"label": [1] * n, "x": [0.0] * n, "a": list(range(n))}), file)
    source = parquet_source(files, "label", ["x"], ["a"])
    for n in (9, 11):
        pq.write_table(pa.table({"label": [1] * n, "x": [0.0] * n, "a": list(range(n))}), files[0])
        with pytest.raises(DataError, match=r"0.parquet: it no longer has the 10 rows of when it was opened"):
            source.read(0, 15, BadRows("error"))


def test_long_values_are_cut_in_messages(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [1], "a": [[b"f" * 100, *([b"1"] * 60)]]}), tmp_path / "a.parquet")
    source = parquet_source([tmp_path / "a.parquet"], "label", [], ["a"], hexadecimal=["a"])
    shown = ", ".join([f"'{'f' * 40}'...", *(["'1'"] * 39), "..."])
    with pytest.raises(DataError) as caught:
        source.read(0, 1, BadRows("error"))
    assert str(caught.value) == (
        f"{tmp_path / 'a.parquet'}:1: a is [{shown}]; allowed: 1 to 16 hexadecimal digits or nothing"
    )
