"""MLPerf's binary click logs, mapped into memory: npy files of dense features, ids and labels, npz of multi-hot ids."""

import zipfile
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from launch.data.errors import DataError, readable
from launch.data.rows import Array
from launch.data.shards import BLOCK
from launch.data.source import Block, RowSource
from launch.data.validity import BINARY, Labels, Validity

_DENSE, _LABELS, _ONE_HOT, _MULTI_HOT = "_dense.npy", "_labels.npy", "_sparse.npy", "_sparse_multi_hot.npz"


def npy_source(
    prefixes: Sequence[str | Path],
    num_features: int,
    dense_features: int,
    ids_per_row: Sequence[int] | None = None,
    labels: Labels = BINARY,
) -> RowSource:
    """Returns the rows of files with common prefixes, one prefix after the other.

    A prefix ``day_0`` has ``day_0_dense.npy`` (N, dense features) and ``day_0_labels.npy`` (N,) or (N, 1). Ids are in
    ``day_0_sparse_multi_hot.npz``, whose array "f" (N, H_f) has those of feature f, or in ``day_0_sparse.npy`` (N, F).

    The least int64, -2^63, stands for a missing id.

    Args:
        prefixes (Sequence[str | Path]): of the files.
        num_features (int): F.
        dense_features (int): number of dense features.
        ids_per_row (Sequence[int] | None): H_f that the files must have; default: any.
        labels (Labels): how they are read; if they are optional, ``day_0_labels.npy`` may be missing.

    Raises:
        DataError: a file is missing, unreadable, or of another shape or type; no file has any row.
    """
    validity = Validity("label", [f"dense {i}" for i in range(dense_features)], labels)
    files = [_NpyFiles(str(prefix), num_features, validity) for prefix in prefixes]
    source = RowSource(files, random_access=True)
    with_rows = [file for file in files if file.num_rows]
    for file in with_rows:
        for allowed, where in ((ids_per_row, "data.multi_hot"), (with_rows[0].ids_per_row, with_rows[0].name)):
            if allowed is not None and file.ids_per_row != tuple(allowed):
                problem = f"{list(file.ids_per_row)} ids per feature; allowed: {list(allowed)}, as {where}"
                raise DataError(file.name, problem)
    return source


class _NpyFiles:
    def __init__(self, prefix: str, num_features: int, validity: Validity) -> None:
        self.name, self._validity = prefix, validity
        self._dense = _mapped(prefix + _DENSE)
        labelled = not validity.labels.optional or Path(prefix + _LABELS).exists()
        self._labels = _mapped(prefix + _LABELS) if labelled else np.full(len(self._dense), np.nan, np.float32)
        if self._labels.ndim == 2 and self._labels.shape[1] == 1:
            self._labels = self._labels[:, 0]
        n = self.num_rows = len(self._labels)
        _check(prefix + _LABELS, self._labels, (n,), "biuf")
        _check(prefix + _DENSE, self._dense, (n, len(validity.dense)), "fiu")
        if Path(prefix + _MULTI_HOT).exists():
            self._ids = _members(prefix + _MULTI_HOT, num_features)
            for f, ids in enumerate(self._ids):
                _check(f"{prefix}{_MULTI_HOT}[{f}]", ids, (n, ids.shape[-1]), "iu")
            self.ids_per_row = tuple(ids.shape[1] for ids in self._ids)
        else:
            self._ids = [_mapped(prefix + _ONE_HOT)]
            _check(prefix + _ONE_HOT, self._ids[0], (n, num_features), "iu")
            self.ids_per_row = (1,) * num_features

    def blocks(self, start: int) -> Generator[Block, None, None]:
        for first in range(start, self.num_rows, BLOCK):
            yield self._block(first, min(first + BLOCK, self.num_rows))

    def _block(self, start: int, stop: int) -> Block:
        part = slice(start, stop)
        parts = [_signed(ids[part]) for ids in self._ids]
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        with np.errstate(over="ignore"):  # an infinite value is a fault of its row
            dense = self._dense[part].astype(np.float32)
        return self._validity.block(
            np.asarray(self._labels[part]), dense, ids, self.ids_per_row, None, {}, partial(self._value, start)
        )

    def _value(self, start: int, i: int, column: str) -> str:
        """Returns what stands in a column of row ``start + i``."""
        if column == self._validity.label:
            return str(self._labels[start + i])
        return str(self._dense[start + i, self._validity.dense.index(column)])

    def quoted(self, row: int, feature: int) -> str:
        if len(self._ids) == 1 and len(self.ids_per_row) > 1:
            return str(self._ids[0][row, feature])
        ids = self._ids[feature][row].tolist()
        return str(ids[0] if len(ids) == 1 else ids)

    def location(self, row: int) -> str:
        return f"{self.name}:{row + 1}"


def _signed(ids: Array) -> Array:
    """Returns 64-bit ids as int64: beside signed ones, NumPy makes floats of unsigned ones."""
    if ids.dtype.kind == "u" and ids.dtype.itemsize == 8:
        return np.asarray(ids, np.uint64).view(np.int64)
    return np.asarray(ids)


def _check(name: str, array: Array, shape: tuple[int, ...], kinds: str) -> None:
    if array.shape != shape:
        raise DataError(name, f"shape {array.shape}; allowed: {shape}")
    if array.dtype.kind not in kinds:
        raise DataError(name, f"type {array.dtype}; allowed: {'integers' if 'f' not in kinds else 'numbers'}")


def _mapped(path: str) -> Array:
    with readable(path, "npy", ValueError, EOFError):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _members(path: str, num_features: int) -> list[Array]:
    """Returns arrays "0", "1", … of an npz file, mapped into memory if they are not compressed."""
    with (
        readable(path, "npz", zipfile.BadZipFile, ValueError, EOFError),
        open(path, "rb") as file,
        zipfile.ZipFile(file) as archive,
    ):
        names = archive.namelist()
        if missing := [f for f in range(num_features) if f"{f}.npy" not in names]:
            raise DataError(path, f"no array {missing[0]}; it has {', '.join(n.removesuffix('.npy') for n in names)}")
        return [_member(path, file, archive, f"{f}.npy") for f in range(num_features)]


def _member(path: str, file: IO[bytes], archive: zipfile.ZipFile, name: str) -> Array:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(name) as member:
            return np.lib.format.read_array(member, allow_pickle=False)
    # Find the beginning of the array, after the headers of zip and npy, because NumPy maps no member of an npz.
    file.seek(info.header_offset + 26)
    name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
    file.seek(info.header_offset + 30 + name_length + extra_length)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")
