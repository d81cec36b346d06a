"""Criteo's TSV, a preset of the reader that test_data_csv tests: its columns, and files that cannot be used."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from click_rows import click_rows, tsv_lines, write_tsv
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.data.criteo_tsv import tsv_source
from launch.data.errors import BadRows, DataError
from launch.data.rows import MISSING

GOOD = "\t".join(["0", *["3"] * 13, *["000000ff"] * 26])
REAL = Path(__file__).parents[3] / "shared" / "data" / "criteo_kaggle_137k.tsv.gz"


def with_field(i: int, text: str) -> str:
    fields = GOOD.split("\t")
    fields[i] = text
    return "\t".join(fields)


@settings(max_examples=30)
@given(
    label=st.sampled_from("01"),
    dense=st.lists(
        st.one_of(st.just(""), st.integers(-(2**40), 2**40).map(str), st.floats(-1e6, 1e6).map(str)),
        min_size=13,
        max_size=13,
    ),
    ids=st.lists(
        st.one_of(st.just(""), st.text("0123456789abcdefABCDEF", min_size=1, max_size=8)), min_size=26, max_size=26
    ),
    end=st.sampled_from(["\n", "\r\n", ""]),
)
def test_every_field_as_python_reads_it(
    tmp_path_factory: pytest.TempPathFactory, label: str, dense: list[str], ids: list[str], end: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "fields.txt"
    file.write_bytes(("\t".join([label, *dense, *ids]) + end).encode())
    rows = tsv_source([file]).read(0, 1, BadRows("error"))
    assert rows.labels.tolist() == [float(label)]
    expected = np.array([[np.float32(float(x)) if x else np.nan for x in dense]])
    np.testing.assert_allclose(rows.dense, expected, rtol=2e-7)
    assert rows.ids.tolist() == [[int(x, 16) if x else MISSING for x in ids]]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (GOOD + "\t1", "41 columns; allowed: 40"),
        (with_field(0, "2"), "label is '2'; allowed: 0, 1"),
        (with_field(13, "inf"), "I13 is 'inf'; allowed: a finite number or nothing"),
        (with_field(39, f"1{0:015x}ff"), f"C26 is '1{0:015x}ff'; allowed: 1 to 16 hexadecimal digits or nothing"),
        (with_field(20, "\x00\x01"), "C7 is '\\x00\\x01'; allowed: 1 to 16 hexadecimal digits or nothing"),
        (with_field(20, "\xe9"), "C7 is 'é'; allowed: 1 to 16 hexadecimal digits or nothing"),
    ],
)
def test_malformed_rows(tmp_path: Path, line: str, problem: str) -> None:
    file = write_tsv(tmp_path / "train.txt", [GOOD, line, GOOD])
    with pytest.raises(DataError) as caught:
        tsv_source([file]).read(0, 3, BadRows("error"))
    assert str(caught.value) == f"{file}:2: {problem}"

    bad = BadRows("skip")
    rows = tsv_source([file]).read(0, 3, bad)
    assert (bad.count, bad.first) == (1, f"{file}:2: {problem}")
    assert rows.weights is not None
    assert rows.weights.tolist() == [1, 0, 1]
    assert rows.ids[[0, 2]].tolist() == [[255] * 26] * 2
    assert rows.dense[1].tolist() == [0] * 13


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            tsv_source([path])
        return str(caught.value)

    assert message(tmp_path / "none.txt") == f"{tmp_path / 'none.txt'}: no such file"
    assert message(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert message(empty) == f"{empty}: empty"
    empty.write_bytes(gzip.compress(b""))
    assert message(empty) == f"{empty}: empty"

    lines = tsv_lines(click_rows(np.random.default_rng(2), 2000))
    whole = write_tsv(tmp_path / "train.gz", lines).read_bytes()
    cut = tmp_path / "cut.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    location, _, problem = message(cut).partition(": ")
    assert problem == "a truncated gzip file: it ends in the middle of a member"
    assert 900 < int(location.rpartition(":")[2]) < 1100
    cut.write_bytes(whole[:-8] + b"checksum")
    assert "not gzip, or corrupt" in message(cut)


@pytest.mark.skipif(not REAL.exists(), reason="the real Criteo sample is not beside this checkout")
def test_real_rows() -> None:
    source = tsv_source([REAL])
    rows = source.read(0, source.num_rows, BadRows("error"))
    assert source.num_rows == 137_139
    assert rows.labels.mean() == pytest.approx(0.2568, abs=1e-4)
    distinct = [len(np.unique(column[column != MISSING])) for column in rows.ids.T]
    assert sum(distinct) == 316_179
    assert distinct[2] == 61_763
