"""Criteo's raw click logs: Kaggle's ``train.txt`` and the 1TB set's ``day_0`` … ``day_23``, plain or gzip."""

from collections.abc import Sequence
from pathlib import Path

from launch.data.delimited import DelimitedFile
from launch.data.errors import OnBadRow
from launch.data.source import RowSource
from launch.data.validity import BINARY, Labels
from launch.sections import CRITEO_DENSE, CRITEO_FEATURES, CsvSection

_DENSE = tuple(f"I{i + 1}" for i in range(CRITEO_DENSE))
_IDS = tuple(f"C{i + 1}" for i in range(len(CRITEO_FEATURES)))
_COLUMNS = CsvSection(
    "label", _DENSE, _IDS, hexadecimal=_IDS, delimiter="\t", quoted=False, names=("label", *_DENSE, *_IDS)
)


def tsv_source(paths: Sequence[str | Path], labels: Labels = BINARY, on_bad_row: OnBadRow = "error") -> RowSource:
    """Returns the rows of the files, one after the other.

    If labels are optional, a file whose first line has 39 columns, as Kaggle's ``test.txt``, has no labels.

    Raises:
        DataError: see `launch.data.delimited.DelimitedFile`.
    """
    return RowSource([DelimitedFile(path, _COLUMNS, labels, on_bad_row) for path in paths])
