"""Lines of text with columns by name: what is read, what is refused, and where a malformed line stands."""

import csv
import gzip
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data import text as lines_of_text
from launch.data.delimited import DelimitedFile
from launch.data.errors import BadRows, DataError, OnBadRow
from launch.data.id_values import hash_of_text, id_values
from launch.data.rows import MISSING
from launch.data.source import RowSource
from launch.data.validity import BINARY, Labels
from launch.sections import CsvSection
from torchrec_qr.cli.schema import ConfigError

COLUMNS = CsvSection("clicked", ("price",), ("user", "shop"))
HEADER = "user,clicked,ignored,shop,price\n"


def source_of(path: Path, content: str | bytes, columns: CsvSection = COLUMNS, **options: Any) -> RowSource:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    dialect = {k: options.pop(k) for k in ("delimiter", "quoted", "nulls", "names") if k in options}
    return opened([path], replace(columns, **dialect), **options)


def opened(
    paths: Sequence[Path], columns: CsvSection, labels: Labels = BINARY, on_bad_row: OnBadRow = "error"
) -> RowSource:
    return RowSource([DelimitedFile(path, columns, labels, on_bad_row) for path in paths])


def refusal(path: Path, content: str | bytes) -> str:
    with pytest.raises(DataError) as caught:
        source_of(path, content)
    return str(caught.value).removeprefix(str(path))


def bad_lines(source: RowSource) -> tuple[int, str | None, list[float]]:
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
    columns = CsvSection("rating", (), ("user",), hexadecimal=("user",))
    text = 'ff\t4\t"\n\\N\t3.5\t""\n10\t5\t\n'
    options: dict[str, Any] = {
        "delimiter": "\t",
        "quoted": False,
        "nulls": ("", "\\N"),
        "names": ("user", "rating", "x"),
    }
    above = Labels(above=3.5)
    rows = source_of(tmp_path / "a.tsv", text, columns, labels=above, **options).read(0, 3, BadRows("error"))
    assert (rows.labels.tolist(), rows.ids.tolist(), rows.dense.shape) == ([1, 0, 1], [[255], [MISSING], [16]], (3, 0))

    unlabelled = "ff\tx\n10\ty\n"
    source = source_of(tmp_path / "b.tsv", unlabelled, columns, labels=Labels(optional=True, above=3.5), **options)
    rows = source.read(0, 2, BadRows("error"))
    assert np.isnan(rows.labels).all()
    assert rows.ids.tolist() == [[255], [16]]


def test_a_label_that_is_optional_may_be_missing_in_some_rows(tmp_path: Path) -> None:
    text, optional = HEADER + "1,,,2,3\n1,1,,2,3\n", Labels(optional=True)
    rows = source_of(tmp_path / "a.csv", text, labels=optional).read(0, 2, BadRows("error"))
    np.testing.assert_array_equal(rows.labels, np.float32([np.nan, 1]))
    rows = source_of(tmp_path / "a.csv", "user,shop,price\n1,2,3\n", labels=optional).read(0, 1, BadRows("error"))
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
        ('7,1,a,5,"0.5', "a line with a carriage return or an open quote"),
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
    columns = CsvSection("clicked", (), ("user",), nulls=("\x01none",))
    rows = opened([file], columns).read(0, len(table), BadRows("error"))
    assert rows.labels.tolist() == [float(label) for _, label in table]
    for (text, _), value in zip(table, rows.ids[:, 0].tolist(), strict=True):
        if not text:
            assert value == MISSING
        elif not text.removesuffix(".0").lstrip("-").isdigit():
            assert value == hash_of_text(text.encode())


def test_files_are_looked_at_before_they_are_read(tmp_path: Path) -> None:
    message = partial(refusal, tmp_path / "a.csv")
    assert message("user,clicked,shop,price,user\n") == ": empty"
    assert message("") == ": empty"
    assert message("\n\n\r\n") == ": empty"
    assert message("user,clicked,shop,price,user\n1,1,1,1,1\n") == ": 2 columns are called 'user'; allowed: one"
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
    source = opened([tmp_path / f"{i}.csv" for i in range(4)], COLUMNS)
    assert source.empty == [str(tmp_path / "1.csv"), str(tmp_path / "2.csv")]
    assert source.num_rows == 2 * n
    for start, stop in [(0, 2 * n), (n - 1, n + 1), (n // 2, n // 2 + 5), (2 * n - 1, 2 * n), (3, 4)]:
        rows = source.read(start, stop, BadRows("error"))
        assert rows.ids[:, 0].tolist() == list(range(start, stop))
        assert rows.labels.tolist() == [float(i < n) for i in range(start, stop)]
    assert source.location(n) == f"{tmp_path / '3.csv'}:2"
    source.close()


VALUES = ["", "1", "0", "a", '"', '""', 'a"b', '"a""b"', '"x,y"', '"open', '"x"y', "ü", "\ufeff1", "\r", "nan", "\0"]
LINES = st.lists(st.lists(st.sampled_from(VALUES), min_size=2, max_size=4).map(",".join), min_size=1, max_size=12)
ALLOWED_LABELS = ("0", "1")


def fields_of(line: str) -> list[str] | None:
    """The values of one line as Python's csv module reads them, or None: it is no row."""
    line = line.removesuffix("\r")
    if not line or "\r" in line or len(list(csv.reader([line + "\n", "\n"]))) == 1:  # the quote takes in the next line
        return None
    return next(csv.reader([line]))


@given(
    lines=LINES,
    ends=st.lists(st.sampled_from(["\n", "\r\n"]), min_size=1),
    blank=st.sampled_from(["", "\n", "\r\n\n", "\n\r"]),
    mark=st.sampled_from(["", "\ufeff"]),
    chunk=st.sampled_from([5, 16, 1 << 19]),
    member=st.sampled_from([None, 1, 30]),
    data=st.data(),
)
def test_any_lines_from_any_row_on(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    ends: list[str],
    blank: str,
    mark: str,
    chunk: int,
    member: int | None,
    data: st.DataObject,
) -> None:
    lines = [*lines, "1,last,1"]  # trailing blank lines are none
    whole = mark + "".join(line + ends[i % len(ends)] for i, line in enumerate(lines)) + blank
    plain = whole.encode()
    if member is not None:  # zeros pad a member
        plain = b"".join(gzip.compress(plain[i : i + member]) + b"\0" for i in range(0, len(plain), member))
    file = tmp_path_factory.getbasetemp() / "lines"
    file.write_bytes(plain)
    # The file's first mark is that of its encoding, whoever wrote it.
    unmarked = [lines[0].removeprefix("\ufeff"), *lines[1:]] if not mark else lines
    # A line that ends in a carriage return of its own has one too many before "\r\n", and just one before "\n".
    expected = [fields_of(line + ends[i % len(ends)].removesuffix("\n")) for i, line in enumerate(unmarked)]
    expected = [row if row and len(row) == 3 and row[0] in ALLOWED_LABELS else None for row in expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_of_text, "_READ", chunk)
        columns = CsvSection("label", (), ("user", "shop"), names=("label", "user", "shop"))
        source = opened([file], columns, on_bad_row="skip")
        assert source.num_rows == len(lines)
        ranges = st.tuples(st.integers(0, len(lines) - 1), st.integers(1, len(lines))).filter(lambda r: r[0] < r[1])
        for start, stop in [(0, len(lines)), *data.draw(st.lists(ranges, max_size=3))]:
            bad = BadRows("skip")
            rows = source.read(start, stop, bad)
            wanted = expected[start:stop]
            weights = np.ones(len(rows)) if rows.weights is None else rows.weights
            assert weights.tolist() == [float(row is not None) for row in wanted]
            assert bad.count == wanted.count(None)
            if bad.count:
                assert str(bad.first).startswith(f"{file}:{start + wanted.index(None) + 1}: ")
            for i, row in enumerate(wanted):
                if row is not None:
                    ids, _ = id_values(pa.array(row[1:]), False, lambda *_: None)
                    assert rows.ids[i].tolist() == ids.tolist()
                    assert rows.labels[i] == float(row[0])
        source.close()


def test_a_malformed_line_may_be_of_any_encoding(tmp_path: Path) -> None:
    lines = [b"7,1,\xfc,5,0.5", b"7,1,\xfc,5", b"7,1,\xfc,5,0.5", b"7,\xfc,,5,0.5", b'7,1,"\xfc,5,0.5']
    file = tmp_path / "a.csv"
    found = bad_lines(source_of(file, HEADER.encode() + b"\n".join(lines), on_bad_row="skip"))
    assert found == (3, f"{file}:3: 4 columns; allowed: 5", [1, 0, 1, 0, 0])


@pytest.mark.parametrize("line", ['7,1,"a\rb",5,1', '7,1,"a,5,1', "7,1", "", "7,1,\x01,5,1,"], ids=repr)
def test_malformed_lines_cost_no_more_than_a_second_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    read, sizes = pyarrow.csv.read_csv, []

    def counted(file: Any, *options: Any) -> pa.Table:
        sizes.append(file.size())
        return read(file, *options)

    content = HEADER + "".join((line if i % 3 else GOOD) + "\n" for i in range(20_000)) + GOOD
    source = source_of(tmp_path / "a.csv", content, on_bad_row="skip")
    monkeypatch.setattr(pyarrow.csv, "read_csv", counted)
    assert bad_lines(source)[0] == 13_333
    assert sum(sizes) <= 2 * len(content)


def test_values_that_are_no_numbers_beside_those_that_are(tmp_path: Path) -> None:
    prices = {"1x": None, " 1": None, "0x10": None, "1_0": None, "1e39": None, "inf": None, "ü": None}
    prices |= {"+1": 1.0, ".5": 0.5, "5.": 5.0, "1e-50": 0.0, "-2E3": -2000.0, "nan": np.nan, "": np.nan}
    content = HEADER + "".join(f"7,1,,5,{price}\n" for price in prices)
    rows = source_of(tmp_path / "a.csv", content, on_bad_row="skip").read(0, len(prices), BadRows("skip"))
    assert rows.weights is not None
    assert rows.weights.tolist() == [float(value is not None) for value in prices.values()]
    np.testing.assert_array_equal(rows.dense[:, 0], np.float32([value or 0 for value in prices.values()]))


def test_booleans_are_numbers_as_in_parquet(tmp_path: Path) -> None:
    content = HEADER + "1,true,,5,False\n2,FALSE,,5,TRUE\n3,0,,5,0.5\n4,1,,5,\n5,truey,,5,1\n6,\xfc,,5,1\n"
    rows = source_of(tmp_path / "a.csv", content.encode("latin-1"), on_bad_row="skip").read(0, 6, BadRows("skip"))
    assert rows.weights is not None
    assert rows.weights.tolist() == [1, 1, 1, 1, 0, 0]
    assert rows.labels.tolist() == [1, 0, 0, 1, 0, 0]
    np.testing.assert_array_equal(rows.dense[:, 0], np.float32([0, 1, 0.5, np.nan, 0, 0]))


def test_a_header_that_another_delimiter_cuts(tmp_path: Path) -> None:
    message = partial(refusal, tmp_path / "a.csv")
    allowed = "allowed: columns with ',' between them, which is data.csv.delimiter"
    assert message(HEADER.replace(",", ";") + GOOD) == f":1: one column, 'user;clicked;ignored;shop;price'; {allowed}"
    assert message("user\tclicked\n1\t1") == f":1: one column, 'user\\tclicked'; {allowed}"
    assert message("user\n1") == ": no column 'clicked'; it has user"
    assert message(HEADER.replace("clicked", " clicked ") + GOOD) == (
        ": no column 'clicked'; it has user, ' clicked ', ignored, shop, price"
    )
    for mark in ("utf-16", "utf-16-be"):
        text = "\ufeff" * (mark == "utf-16-be") + HEADER + GOOD
        assert message(text.encode(mark)) == ": a file of UTF-16; allowed: text, plain or gzip"


def test_files_that_are_no_tables_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = partial(refusal, tmp_path / "a.csv")
    misled = ":1: a line with a carriage return or an open quote"
    assert message((HEADER + GOOD).replace("\n", "\r") + "\r") == misled  # a Macintosh of old wrote it
    assert message("us\rer" + HEADER + GOOD) == misled
    assert message('user,clicked,ignored,shop,"price\n' + GOOD) == misled
    assert message("u" * 200_000 + "\n1\n").startswith(":1: the names of the columns cannot be read: field larger")
    assert message("a,a,b\n1,1,1\n") == ": no column 'clicked'; it has a, a, b"
    many = ",".join(f"c{i}" for i in range(60))
    assert message(many + "\n" + many).endswith("c48, c49 and 10 more")
    monkeypatch.setattr(lines_of_text, "_LONGEST_LINE", 1 << 20)
    problem = "a line of more than 1,048,576 bytes; allowed: lines that end in newlines"
    assert message(HEADER + "x" * (1 << 21)) == f":2: {problem}"
    with pytest.raises(ConfigError, match="delimiter"):
        CsvSection(delimiter="\0")


def test_columns_that_are_not_read_may_share_a_name(tmp_path: Path) -> None:
    rows = source_of(tmp_path / "a.csv", "user,clicked,,shop,,price\n7,1,x,5,y,0.5\n").read(0, 1, BadRows("error"))
    assert (rows.ids.tolist(), rows.dense.tolist()) == ([[7, 5]], [[0.5]])


def test_a_line_is_longer_than_a_block(tmp_path: Path) -> None:
    lines = [f"7,{i % 2},{'x' * (700_000 if i == 2 else 1)},{i},0.5" for i in range(5)]
    for name in ("a.csv", "a.csv.gz"):
        source = source_of(tmp_path / name, HEADER + "\n".join(lines))
        for start in range(5):
            assert source.read(start, 5, BadRows("error")).ids[:, 1].tolist() == list(range(start, 5))


def test_one_malformed_line_does_not_make_a_file_unlabelled(tmp_path: Path) -> None:
    columns, names = CsvSection("label", (), ("user",)), ("label", "user")
    source = source_of(
        tmp_path / "a.csv", "7\n1,8\n0,9\n", columns, names=names, labels=Labels(optional=True), on_bad_row="skip"
    )
    assert bad_lines(source) == (1, f"{tmp_path / 'a.csv'}:1: 1 columns; allowed: 2", [0, 1, 1])


def test_a_column_may_have_several_uses(tmp_path: Path) -> None:
    columns = CsvSection("clicked", ("user", "clicked"), ("user", "user", "clicked"))
    rows = source_of(tmp_path / "a.csv", HEADER + GOOD + "\n", columns).read(0, 1, BadRows("error"))
    assert (rows.labels.tolist(), rows.dense.tolist(), rows.ids.tolist()) == ([1], [[7, 1]], [[7, 7, 1]])


@pytest.mark.parametrize("new", [lambda old: old[:-1], lambda old: old[:1]], ids=["one less", "one"])
def test_a_file_that_changes_is_an_error(tmp_path: Path, new: Callable[[list[str]], list[str]]) -> None:
    lines = [GOOD] * 10
    file = tmp_path / "a.csv"
    source = source_of(file, HEADER + "\n".join(lines) + "\n")
    file.write_text(HEADER + "\n".join(new(lines)) + "\n")
    with pytest.raises(DataError, match=r"a.csv: it no longer has the 10 rows of when it was opened"):
        source.read(0, 10, BadRows("error"))


def test_a_reading_that_failed_may_be_repeated(tmp_path: Path) -> None:
    source = source_of(tmp_path / "a.csv", HEADER + "1,1,,1,1\n2,1,,1,1\n3,7,,1,1\n4,1,,1,1\n", on_bad_row="skip")
    source.read(0, 1, BadRows("error"))
    with pytest.raises(DataError, match="clicked is '7'"):
        source.read(1, 4, BadRows("error"))
    assert source.read(1, 4, BadRows("skip")).ids[:, 0].tolist() == [2, 0, 4]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_nothing_stays_open(tmp_path: Path, name: str) -> None:
    content = HEADER + (GOOD + "\n") * 400_000
    # Threads of earlier tests may end meanwhile.
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    source = source_of(tmp_path / name, content)
    source.read(0, 10, BadRows("error"))
    source.close()
    assert (set(threading.enumerate()) - threads, len(os.listdir("/proc/self/fd"))) == (set(), files)
    source.read(0, 10, BadRows("error"))
    del source  # abandoned
    assert (set(threading.enumerate()) - threads, len(os.listdir("/proc/self/fd"))) == (set(), files)
