"""Turns click logs into the binary form: ``python -m launch.data.preprocess train.txt --out data/kaggle/train``.

Values of categorical features become 1, 2, … in the order of their frequency in the first part of the rows; 0 stands
for all others. It writes ``<out>_dense.npy``, ``<out>_sparse.npy``, ``<out>_labels.npy`` (the layout of MLPerf's files)
and ``<out>_vocabulary.npz``. A job reads them with ``data: {format: npy, files: [<out>], ids: vocabulary}``.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from launch.data.criteo_tsv import tsv_source
from launch.data.errors import BadRows, DataError, OnBadRow
from launch.data.id_mapping import ValueCounts, Vocabulary, columns, save_vocabularies
from launch.data.source import RowSource
from launch.data.split import expanded
from launch.sections import CRITEO_DENSE, CRITEO_FEATURES

_AT_A_TIME = 65_536


def preprocess(
    source: RowSource,
    out: str,
    vocabulary_rows: int,
    min_count: int,
    on_bad_row: OnBadRow,
    progress: Progress,
) -> tuple[ValueCounts, list[Vocabulary], BadRows]:
    """Writes the binary files of a source that has one id per feature; files appear only when they are complete.

    Args:
        source (RowSource): of Criteo's 13 dense and 26 categorical features.
        out (str): prefix of the files.
        vocabulary_rows (int): how many of the first rows the vocabulary is built from.
        min_count (int): least number of occurrences there.
        on_bad_row (OnBadRow): a malformed row ends it, or is left out.
        progress (Progress): shows two passes.

    Returns:
        The counts over the first rows, the vocabularies, and the malformed rows.
    """
    counts = ValueCounts(range(len(CRITEO_FEATURES)))
    for start, stop in _steps(vocabulary_rows, "counting", progress):
        counts.add(source.read(start, stop, BadRows(on_bad_row)))
    vocabularies = counts.vocabularies(min_count)

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    shapes = {"dense": (CRITEO_DENSE, "<f4"), "sparse": (len(CRITEO_FEATURES), "<i4"), "labels": (1, "<i4")}
    parts = {name: Path(f"{out}_{name}.part") for name in shapes}
    bad_rows, written = BadRows(on_bad_row), 0
    source = source.reopened()
    with ExitStack() as stack:
        files = {name: stack.enter_context(part.open("wb")) for name, part in parts.items()}
        for name, (width, kind) in shapes.items():
            _write_header(files[name], kind, source.num_rows, width)
        for start, stop in _steps(source.num_rows, "writing", progress):
            rows = source.read(start, stop, bad_rows)
            if rows.weights is not None:
                rows = rows.take(np.flatnonzero(rows.weights))
            ids = [vocabulary.ids(values) for vocabulary, values in zip(vocabularies, columns(rows), strict=True)]
            arrays = {"dense": rows.dense, "sparse": np.concatenate(ids, axis=1), "labels": rows.labels}
            for name, array in arrays.items():
                array.astype(shapes[name][1]).tofile(files[name])
            written += len(rows)
        for name, (width, kind) in shapes.items():
            _write_header(files[name], kind, written, width)
    if written == 0:
        for part in parts.values():
            part.unlink()
    bad_rows.require_good(written, source.location(0))
    save_vocabularies(f"{out}_vocabulary.part", dict(zip(CRITEO_FEATURES, vocabularies, strict=True)))
    for name, part in parts.items():
        part.replace(f"{out}_{name}.npy")
    Path(f"{out}_vocabulary.part").replace(f"{out}_vocabulary.npz")
    return counts, vocabularies, bad_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        source = tsv_source(expanded(arguments.files), on_bad_row=arguments.on_bad_row)
        vocabulary_rows = max(1, round(source.num_rows * arguments.vocabulary_share))
        with Progress(console=console) as progress:
            counts, vocabularies, bad = preprocess(
                source, arguments.out, vocabulary_rows, arguments.min_count, arguments.on_bad_row, progress
            )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(_report(counts, vocabularies))
    console.print(f"{source.num_rows - bad.count:,} rows written to {arguments.out}_*.npy", markup=False)
    if bad.count:
        console.print(f"{bad.count:,} malformed rows left out, the first: {bad.first}", markup=False)
    return 0


def _steps(num_rows: int, doing: str, progress: Progress) -> Iterator[tuple[int, int]]:
    for start in progress.track(range(0, num_rows, _AT_A_TIME), description=doing):
        yield start, min(start + _AT_A_TIME, num_rows)


def _write_header(file: BinaryIO, kind: str, num_rows: int, width: int) -> None:
    """Writes the header of an npy file, which NumPy pads, so that any number of rows takes as many bytes."""
    file.seek(0)
    header = {"descr": kind, "fortran_order": False, "shape": (num_rows, width)}
    np.lib.format.write_array_header_1_0(file, header)


def _report(counts: ValueCounts, vocabularies: Sequence[Vocabulary]) -> Table:
    table = Table(title="Categorical features")
    table.add_column("feature")
    for name in ("distinct values", "in the vocabulary", "rows of a table for all"):
        table.add_column(name, justify="right")
    for feature, distinct, vocabulary in zip(CRITEO_FEATURES, counts.cardinalities(), vocabularies, strict=True):
        table.add_row(feature, f"{distinct:,}", f"{len(vocabulary):,}", f"{len(vocabulary) + 1:,}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.data.preprocess", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="+", help="Criteo's TSV, plain or gzip, in the order of time; patterns are resolved"
    )
    parser.add_argument("--out", required=True, metavar="PREFIX", help="of the files that are written")
    parser.add_argument(
        "--min-count", type=int, default=1, help="least occurrences in the vocabulary (default: %(default)s)"
    )
    parser.add_argument(
        "--vocabulary-share",
        type=float,
        default=6 / 7,
        metavar="SHARE",
        help="first share of the rows that the vocabulary is built from: those that are trained on (default: 6/7)",
    )
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
