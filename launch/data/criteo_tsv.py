"""Criteo's raw click logs: Kaggle's ``train.txt`` and the 1TB set's ``day_0`` … ``day_23``, plain or gzip."""

from collections.abc import Sequence
from pathlib import Path

from launch.data.columns import Columns
from launch.data.delimited import Dialect, delimited_source
from launch.data.errors import OnBadRow
from launch.data.source import Labels, SequentialSource

NUM_DENSE, NUM_CATEGORICAL = 13, 26
_DENSE = tuple(f"I{i + 1}" for i in range(NUM_DENSE))
_IDS = tuple(f"C{i + 1}" for i in range(NUM_CATEGORICAL))
_COLUMNS = Columns("label", _DENSE, _IDS, hexadecimal=_IDS)
_DIALECT = Dialect("\t", quoted=False, names=("label", *_DENSE, *_IDS))


def tsv_source(
    paths: Sequence[str | Path], labels: Labels = "needed", on_bad_row: OnBadRow = "error"
) -> SequentialSource:
    """Returns the rows of the files, one after the other.

    With ``labels="optional"`` a file whose first line has 39 columns, as Kaggle's ``test.txt``, has no labels.

    Raises:
        DataError: see `launch.data.delimited.DelimitedFile`.
    """
    return delimited_source(paths, _COLUMNS, _DIALECT, labels, on_bad_row)
