"""Columns in the names of folders, as Spark partitions rows: read like any other column, from Parquet and from text."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.data.delimited import DelimitedFile
from launch.data.errors import BadRows, DataError
from launch.data.id_values import hash_of_text
from launch.data.parquet import ParquetFile
from launch.data.rows import MISSING, Rows
from launch.data.source import RowSource
from launch.data.split import expanded
from launch.data.validity import BINARY, Labels
from launch.sections import CsvSection, ParquetSection

NULL = "__HIVE_DEFAULT_PARTITION__"


def write(folder: Path, form: str, **columns: Any) -> None:
    folder.mkdir(parents=True)
    if form == "parquet":
        pq.write_table(pa.table(columns), folder / "part-00000.c000.snappy.parquet")
    else:
        lines = [columns, *zip(*columns.values(), strict=True)]
        (folder / "part-00000.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))


def opened(root: Path, form: str, columns: ParquetSection, labels: Labels = BINARY) -> RowSource:
    files = expanded([str(root)])
    if form == "parquet":
        return RowSource([ParquetFile(file, columns, labels) for file in files])
    section = CsvSection(columns.label, columns.dense, columns.ids, columns.hexadecimal)
    return RowSource([DelimitedFile(file, section, labels, "error") for file in files])


def read(source: RowSource) -> Rows:
    return source.read(0, source.num_rows, BadRows("error"))


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_ids_numbers_and_labels_of_folders(tmp_path: Path, form: str) -> None:
    for i, (country, price) in enumerate([("DE", "1.5"), ("a%2Fb ü", "-2"), ("12", NULL), (NULL, "0")]):
        write(tmp_path / f"day={i}" / f"country={country}" / f"price={price}" / f"clicked={i % 2}", form, user=[i, i])
    columns = ParquetSection("clicked", ("price",), ("country", "user", "day"))
    source = opened(tmp_path, form, columns)
    rows = read(source)
    countries = [hash_of_text(b"DE"), hash_of_text("a/b ü".encode()), 12, MISSING]
    assert rows.ids.tolist() == [[countries[i], i, i] for i in range(4) for _ in range(2)]
    np.testing.assert_array_equal(rows.dense[:, 0], np.float32([1.5, 1.5, -2, -2, np.nan, np.nan, 0, 0]))
    assert rows.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert (source.quoted(3, 0), source.quoted(3, 1), source.quoted(7, 0)) == ("'a/b ü'", quoted_user(form), "None")


def quoted_user(form: str) -> str:
    return "1" if form == "parquet" else "'1'"


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_column_of_the_file_comes_before_one_of_its_folders(tmp_path: Path, form: str) -> None:
    write(tmp_path / "user=9" / "clicked=1", form, user=[1], clicked=[0])
    rows = read(opened(tmp_path, form, ParquetSection("clicked", (), ("user",))))
    assert (rows.ids.tolist(), rows.labels.tolist()) == ([[1]], [0])


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_what_is_wrong_with_a_column_of_a_folder(tmp_path: Path, form: str) -> None:
    write(tmp_path / "country=DE" / "price=x", form, user=[1], clicked=[0])
    with pytest.raises(DataError, match=r"no column 'land'; it has user, clicked, country, price$"):
        opened(tmp_path, form, ParquetSection("clicked", (), ("land",)))
    with pytest.raises(DataError, match="price is 'x'; allowed: a finite number or nothing"):
        read(opened(tmp_path, form, ParquetSection("clicked", ("price",), ("user",))))
    with pytest.raises(DataError, match="country is 'DE'; allowed: 0, 1"):
        read(opened(tmp_path, form, ParquetSection("country", (), ("user",))))
    hexadecimal = ParquetSection("clicked", (), ("country", "user"), hexadecimal=("country",))
    assert read(opened(tmp_path, form, hexadecimal)).ids.tolist() == [[0xDE, 1]]


def test_without_a_label_neither_file_nor_folder_need_have_it(tmp_path: Path) -> None:
    write(tmp_path / "country=DE", "parquet", user=[1])
    rows = read(opened(tmp_path, "parquet", ParquetSection("clicked", (), ("country",)), Labels(optional=True)))
    assert np.isnan(rows.labels).all()
    assert rows.ids.tolist() == [[hash_of_text(b"DE")]]
