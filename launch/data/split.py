"""Train, validation and test rows: by time within files, or by file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from launch.data.criteo_tsv import tsv_source
from launch.data.errors import DataError
from launch.data.generator import GeneratorSource
from launch.data.npy import NpySource
from launch.data.parquet import parquet_source
from launch.data.source import Labels, RowSource
from launch.sections import DataSection


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
    train: Split
    validation: Split
    test: Split


def open_splits(section: DataSection, table_rows: Sequence[int]) -> Splits:
    """Opens the sources of a data section and splits them.

    Args:
        section: of the job.
        table_rows: S of the table of each feature, for the generator.

    Raises:
        DataError: a file is missing, unreadable, empty or not what it should be; too few rows for three splits.
    """
    if section.format == "generator":
        generator = GeneratorSource(section.generator, table_rows, section.dense_features, section.multi_hot)
        return _by_time(generator, section.split)
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
    """Returns the files that ``paths`` name, patterns resolved, in the order of the numbers in their names.

    Args:
        paths: files, or patterns such as ``day_*.gz``; ``~`` is the home directory.
        suffix: what each lacks of a file's name; patterns match with it.

    Raises:
        DataError: a pattern that matches nothing.
    """
    files = []
    for path in paths:
        path = str(Path(path).expanduser())
        if not has_magic(path):
            files.append(Path(path))
            continue
        found = sorted(glob(path + suffix), key=_natural)
        if not found:
            raise DataError(path + suffix, "no file matches")
        files += [Path(name.removesuffix(suffix)) for name in found]
    return files


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def opened_files(section: DataSection, paths: Sequence[str], labels: Labels = "needed") -> RowSource:
    """Opens files of the section's format, whatever files the section names itself.

    Args:
        section: of the job.
        paths: files, prefixes of files, or patterns.
        labels: "optional": a file without them has rows whose label is NaN.

    Raises:
        DataError: a file is missing, unreadable, empty or not what it should be.
    """
    if section.format == "criteo_tsv":
        return tsv_source(expanded(paths), labels)
    if section.format == "npy":
        files = expanded(paths, "_labels.npy" if labels == "needed" else "_dense.npy")
        return NpySource(files, len(section.features), section.dense_features, section.multi_hot, labels)
    columns = section.parquet
    return parquet_source(expanded(paths), columns.label, columns.dense, columns.ids or section.features, labels)


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
