"""Lines of text with columns by name: what is read, what is refused, and where a malformed line stands."""

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data.columns import Columns
from launch.data.delimited import Dialect, delimited_source
from launch.data.errors import BadRows, DataError
from launch.data.id_values import hash_of_text
from launch.data.rows import MISSING
from launch.data.source import SequentialSource

COLUMNS = Columns("clicked", ["price"], ["user", "shop"])
HEADER = "user,clicked,ignored,shop,price\n"


def source_of(path: Path, text: str | bytes, columns: Columns = COLUMNS, **options: Any) -> SequentialSource:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    dialect = Dialect(**{k: options.pop(k) for k in ("delimiter", "quoted", "nulls", "names") if k in options})
    return delimited_source([path], columns, dialect, **options)


def bad_lines(source: SequentialSource) -> tuple[int, str | None, list[float]]:
    """Number of bad rows, the first, and the weights of all."""
    bad = BadRows("skip")
    rows = source.read(0, source.num_rows, bad)
    weights = np.ones(len(rows)) if rows.weights is None else rows.weights
    return bad.count, bad.first, weights.tolist()


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_columns_by_name(tmp_path: Path, name: str, end: str, mark: str) -> None:
    lines = ["7,1,x,s1,0.5", "8,0,,,", 'u_1,1,"a,""b""","12",-2e3', "9.0,0,,s1,nan", "", ""]
    text = mark + HEADER.strip() + end + end.join(lines)
    source = source_of(tmp_path / name, text)
    rows = source.read(0, source.num_rows, BadRows("error"))
    assert rows.labels.tolist() == [1, 0, 1, 0]
    np.testing.assert_array_equal(rows.dense, np.float32([[0.5], [np.nan], [-2000], [np.nan]]))
    s1, u1 = hash_of_text(b"s1"), hash_of_text(b"u_1")
    assert rows.ids.tolist() == [[7, s1], [8, MISSING], [u1, 12], [9, s1]]
    assert source.location(2) == f"{tmp_path / name}:4"
    assert source.quoted(2, 0) == "'u_1'"
    assert source.quoted(1, 1) == "None"


def test_tsv_names_nulls_and_hexadecimal(tmp_path: Path) -> None:
    columns = Columns("rating", [], ["user"], hexadecimal=["user"], label_above=3.5)
    text = 'ff\t4\t"\n\\N\t3.5\t""\n10\t5\t\n'
    options: dict[str, Any] = {
        "delimiter": "\t",
        "quoted": False,
        "nulls": ("", "\\N"),
        "names": ("user", "rating", "x"),
    }
    rows = source_of(tmp_path / "a.tsv", text, columns, **options).read(0, 3, BadRows("error"))
    assert (rows.labels.tolist(), rows.ids.tolist(), rows.dense.shape) == ([1, 0, 1], [[255], [MISSING], [16]], (3, 0))

    unlabelled = "ff\tx\n10\ty\n"
    rows = source_of(tmp_path / "b.tsv", unlabelled, columns, labels="optional", **options).read(0, 2, BadRows("error"))
    assert np.isnan(rows.labels).all()
    assert rows.ids.tolist() == [[255], [16]]


def test_a_label_that_is_optional_may_be_missing_in_some_rows(tmp_path: Path) -> None:
    text = HEADER + "1,,,2,3\n1,1,,2,3\n"
    rows = source_of(tmp_path / "a.csv", text, labels="optional").read(0, 2, BadRows("error"))
    np.testing.assert_array_equal(rows.labels, np.float32([np.nan, 1]))
    rows = source_of(tmp_path / "a.csv", "user,shop,price\n1,2,3\n", labels="optional").read(0, 1, BadRows("error"))
    assert np.isnan(rows.labels).all()
    with pytest.raises(DataError, match=r"a.csv: no column 'clicked'; it has user, shop, price"):
        source_of(tmp_path / "a.csv", "user,shop,price\n1,2,3\n")


GOOD = "7,1,,5,0.5"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "an empty line"),
        ("7,1,,5", "4 columns; allowed: 5"),
        ("7,1,,5,0.5,", "6 columns; allowed: 5"),
        ('7,1,"a,5,0.5', "a line with a carriage return or an open quote"),
        ("7,1,a\rb,5,0.5", "a line with a carriage return or an open quote"),
        ("7,,,5,0.5", "clicked is None; allowed: 0, 1"),
        ("7,yes,,5,0.5", "clicked is 'yes'; allowed: 0, 1"),
        ("7,1,,5,1e39", "price is '1e39'; allowed: a finite number or nothing"),
        ("7,1,,5,1.2.3", "price is '1.2.3'; allowed: a finite number or nothing"),
    ],
)
def test_malformed_lines(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "a.csv"
    text = HEADER + "\n".join([GOOD, line, GOOD, line, GOOD]) + "\n"
    with pytest.raises(DataError) as caught:
        source_of(file, text).read(0, 5, BadRows("error"))
    assert str(caught.value) == f"{file}:3: {problem}"
    assert bad_lines(source_of(file, text, on_bad_row="skip")) == (2, f"{file}:3: {problem}", [1, 0, 1, 0, 1])


def test_an_open_quote_loses_its_own_line_alone(tmp_path: Path) -> None:
    lines = [GOOD] * 500
    for i in (3, 4, 250, 499):
        lines[i] = '7,1,"a,5,0.5'
    count, _, weights = bad_lines(source_of(tmp_path / "a.csv", HEADER + "\n".join(lines) + "\n", on_bad_row="skip"))
    assert count == 4
    assert [i for i, weight in enumerate(weights) if weight == 0] == [3, 4, 250, 499]


@given(
    table=st.lists(
        st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), max_size=6), st.integers(0, 1)),
        min_size=1,
        max_size=8,
    )
)
def test_any_text_as_python_writes_it(
    tmp_path_factory: pytest.TempPathFactory, table: Sequence[tuple[str, int]]
) -> None:
    file = tmp_path_factory.getbasetemp() / "texts.csv"
    with file.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows([("clicked", "user"), *((label, text) for text, label in table)])
    columns = Columns("clicked", [], ["user"])
    rows = delimited_source([file], columns, Dialect(nulls=("\x01none",))).read(0, len(table), BadRows("error"))
    assert rows.labels.tolist() == [float(label) for _, label in table]
    for (text, _), value in zip(table, rows.ids[:, 0].tolist(), strict=True):
        if not text:
            assert value == MISSING
        elif not text.removesuffix(".0").lstrip("-").isdigit():
            assert value == hash_of_text(text.encode())


def test_files_are_looked_at_before_they_are_read(tmp_path: Path) -> None:
    def message(text: str | bytes, **options: Any) -> str:
        with pytest.raises(DataError) as caught:
            source_of(tmp_path / "a.csv", text, **options)
        return str(caught.value).removeprefix(str(tmp_path / "a.csv"))

    assert message("user,clicked,shop,price,user\n") == ": empty"
    assert message("") == ": empty"
    assert message("\n\n\r\n") == ": empty"
    assert message("user,clicked,shop,price,user\n1,1,1,1,1\n") == ":1: two columns are called 'user'"
    assert message(HEADER + "7,1,,5,0.5\n7,1,,") == ":3: 4 columns; allowed: 5; the file ends within this line"
    assert message(HEADER + "7,1,,5,0.5\n7,1,,\n") == ":3: 4 columns; allowed: 5"
    assert message(HEADER + "7,2,,5,0.5\n7,1,,5,1\n") == ":2: clicked is '2'; allowed: 0, 1"
    assert message(b"PAR1....") == ": a file of Parquet; allowed: text, plain or gzip"
    assert message(b"\x28\xb5\x2f\xfd....") == ": a file of zstd; allowed: text, plain or gzip"
    whole = source_of(tmp_path / "a.csv", HEADER + "7,1,,5,0.5\n7,1,,5,0.25")
    assert whole.read(1, 2, BadRows("error")).dense.tolist() == [[0.25]]


def test_any_range_of_files_whose_columns_have_other_places(tmp_path: Path) -> None:
    n = 60_000  # several blocks of text
    first = "".join(f"{i},{i},{i},1\n" for i in range(n))
    (tmp_path / "0.csv").write_text(f"user,price,shop,clicked\n{first}\n\n")
    (tmp_path / "1.csv").write_text("")
    (tmp_path / "2.csv").write_text("user,price,shop,clicked\n")
    (tmp_path / "3.csv").write_text("clicked,user,shop,price\n" + "".join(f"0,{i},{i},{i}\n" for i in range(n, 2 * n)))
    source = delimited_source([tmp_path / f"{i}.csv" for i in range(4)], COLUMNS, Dialect())
    assert source.empty == [str(tmp_path / "1.csv"), str(tmp_path / "2.csv")]
    assert source.num_rows == 2 * n
    for start, stop in [(0, 2 * n), (n - 1, n + 1), (n // 2, n // 2 + 5), (2 * n - 1, 2 * n), (3, 4)]:
        rows = source.read(start, stop, BadRows("error"))
        assert rows.ids[:, 0].tolist() == list(range(start, stop))
        assert rows.labels.tolist() == [float(i < n) for i in range(start, stop)]
    assert source.location(n) == f"{tmp_path / '3.csv'}:2"
    source.close()
