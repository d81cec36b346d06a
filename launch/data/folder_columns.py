"""Columns that stand in the names of folders: ``day=2026-11-28/part-0.parquet``, as Spark and Hive partition rows."""

from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

_NULL = "__HIVE_DEFAULT_PARTITION__"


def folder_columns(path: str) -> dict[str, bytes | None]:
    """Returns the value of each column that a folder on the way to a file names; None is a null.

    Spark writes a character that a folder's name cannot have as ``%`` and two hexadecimal digits.

    Example:
        >>> folder_columns("clicks/day=2026-11-28/city=a%2Fb/store=__HIVE_DEFAULT_PARTITION__/part-0.parquet")
        {'day': b'2026-11-28', 'city': b'a/b', 'store': None}
    """
    pairs = [part.partition("=") for part in Path(path).parts[:-1] if "=" in part]
    return {unquote(name): None if value == _NULL else unquote(value).encode() for name, _, value in pairs if name}


def repeated(value: bytes | None, num_rows: int) -> pa.Array:
    """Returns a column that has one value in every row, which is stored once.

    Example:
        >>> repeated(b"DE", 2).to_pylist()
        [b'DE', b'DE']
    """
    index = pa.array(np.zeros(num_rows, np.int8))
    return pa.DictionaryArray.from_arrays(index, pa.array([value], pa.binary()))
