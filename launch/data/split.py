"""Train, validation and test rows: by time within files, or by file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from pathlib import Path

from launch.data.criteo_tsv import tsv_source
from launch.data.delimited import DelimitedFile
from launch.data.errors import DataError
from launch.data.generator import GeneratedRows
from launch.data.npy import npy_source
from launch.data.parquet import ParquetFile
from launch.data.source import RowSource
from launch.data.validity import Labels
from launch.sections import CsvSection, DataSection


@dataclass(frozen=True)
class Split:
    """Rows [start, stop) of a source."""

    name: str
    source: RowSource
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Splits:
    """The three splits of a job."""

    train: Split
    validation: Split
    test: Split

    def empty_files(self) -> list[str]:
        """Returns the names of the files that have no rows, and are left out."""
        splits = (self.train, self.validation, self.test)
        return list(dict.fromkeys(name for split in splits for name in split.source.empty))


def open_splits(section: DataSection, table_rows: Sequence[int]) -> Splits:
    """Opens the sources of a data section and splits them.

    Args:
        section (DataSection): of the job.
        table_rows (Sequence[int]): S of the table of each feature, for the generator.

    Raises:
        DataError: a file is missing, unreadable, empty or not what it should be; too few rows for three splits.
    """
    if section.format == "generator":
        generated = GeneratedRows(section.generator, table_rows, section.dense_features, section.multi_hot)
        return _by_time(RowSource([generated], random_access=True), section.split)
    if section.files:
        return _by_time(opened_files(section, section.files), section.split)
    train, validation = opened_files(section, section.train_files), opened_files(section, section.validation_files)
    if section.test_files:
        test = opened_files(section, section.test_files)
        return Splits(_whole("train", train), _whole("validation", validation), _whole("test", test))
    half = (validation.num_rows + 1) // 2
    return Splits(
        _whole("train", train),
        Split("validation", validation, 0, half),
        Split("test", validation, half, validation.num_rows),
    )


def boundaries(num_rows: int, shares: Sequence[float]) -> tuple[int, int]:
    """Returns where validation and test begin.

    Example:
        >>> boundaries(14, (6 / 7, 1 / 14, 1 / 14)), boundaries(137_139, (6 / 7, 1 / 14, 1 / 14))
        ((12, 13), (117548, 127344))
    """
    train = round(num_rows * shares[0] / sum(shares))
    return train, train + round((num_rows - train) * shares[1] / max(shares[1] + shares[2], 1e-12))


def expanded(paths: Sequence[str], suffix: str = "") -> list[Path]:
    """Returns the files that ``paths`` name, patterns and folders resolved, in the order of the numbers in their names.

    A folder stands for all files in it, those in folders within it included. Names that begin with ``_`` or ``.`` are
    left out: Spark writes ``_SUCCESS`` and ``.crc`` beside its parts.

    Args:
        paths (Sequence[str]): files, folders, or patterns such as ``day_*.gz``; ``~`` is the home directory.
        suffix (str): what each lacks of a file's name; patterns match with it, and there are no folders.

    Raises:
        DataError: a pattern that matches nothing; a folder without files.
    """
    files: list[Path] = []
    for path in paths:
        path = str(Path(path).expanduser())
        found = [Path(path)]
        if has_magic(path):
            names = sorted(glob(path + suffix), key=_natural)
            found = [Path(name.removesuffix(suffix)) for name in names if Path(name).name[0] != "_"]
            if not found:
                raise DataError(path + suffix, "no file matches")
        for file in found:
            files += _files_of(file) if not suffix and file.is_dir() else [file]
    return files


def _files_of(folder: Path) -> list[Path]:
    files = [
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part[0] in "_." for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(str(folder), "a folder without files")
    return sorted(files, key=lambda file: _natural(str(file)))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def opened_files(section: DataSection, paths: Sequence[str], optional_labels: bool = False) -> RowSource:
    """Opens files of the section's format, in place of those that the section names.

    Args:
        section (DataSection): of the job.
        paths (Sequence[str]): files, folders, prefixes of files, or patterns.
        optional_labels (bool): a file without labels has rows whose label is NaN.

    Raises:
        DataError: a file is missing, unreadable or not what it should be; none has any row.
    """
    labels = Labels(optional_labels, section.label_above)
    if section.format == "npy":
        prefixes = expanded(paths, "_dense.npy" if optional_labels else "_labels.npy")
        return npy_source(prefixes, len(section.features), section.dense_features, section.multi_hot, labels)
    files = expanded(paths)
    if section.columns is None:
        return tsv_source(files, labels, section.on_bad_row)
    columns = replace(section.columns, ids=section.id_columns())
    if isinstance(columns, CsvSection):
        return RowSource([DelimitedFile(file, columns, labels, section.on_bad_row) for file in files])
    return RowSource([ParquetFile(file, columns, labels) for file in files])


def _whole(name: str, source: RowSource) -> Split:
    return Split(name, source, 0, source.num_rows)


def _by_time(source: RowSource, shares: Sequence[float]) -> Splits:
    n = source.num_rows
    validation, test = boundaries(n, shares)
    splits = Splits(
        Split("train", source, 0, validation),
        Split("validation", source, validation, test),
        Split("test", source, test, n),
    )
    for split in (splits.train, splits.validation, splits.test):
        if len(split) == 0:
            cut = f"{n} rows leave none for {split.name}, cut by data.split={list(shares)}"
            raise DataError(source.location(0).rpartition(":")[0], f"{cut}; allowed: more rows, or a larger share")
    return splits
