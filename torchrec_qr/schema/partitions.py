"""The ``partitions:`` key of a table: a kind, and exactly one way of sizing it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from torchrec_qr.partitions import (
    MAX_NUM_IDS,
    ChineseRemainder,
    ExplicitPartitions,
    HashPartition,
    MixedRadix,
    Partitions,
    QuotientRemainder,
)
from torchrec_qr.partitions.quotient_remainder import Grouping
from torchrec_qr.schema.errors import ConfigError
from torchrec_qr.schema.strict import Range

# The ways of sizing each kind, its own first.
_SIZINGS = {
    "quotient_remainder": ("num_collisions", "balanced", "compression", "rows"),
    "mixed_radix": ("sizes", "balanced", "compression", "rows"),
    "chinese_remainder": ("sizes", "balanced", "compression", "rows"),
    "explicit": ("file",),
    "hash": ("num_rows", "compression", "rows"),
}
_OPTIONS = {
    "quotient_remainder": ("grouping", "num_partitions"),
    "mixed_radix": ("num_partitions",),
    "chinese_remainder": ("num_partitions",),
}
_CLASSES: dict[str, Any] = {c.kind: c for c in (QuotientRemainder, MixedRadix, ChineseRemainder, HashPartition)}


@dataclass(frozen=True)
class PartitionsSpec:
    """Which row of each partition an id selects, sized in exactly one way.

    Args:
        kind: ``quotient_remainder`` (`QuotientRemainder`), ``mixed_radix`` (`MixedRadix`), ``chinese_remainder``
            (`ChineseRemainder`), ``explicit`` (`ExplicitPartitions`) or ``hash`` (`HashPartition`).
        num_collisions: sizes a quotient-remainder.
        grouping: of a quotient-remainder.
        sizes: sizes a mixed radix or a Chinese remainder.
        file: a .npy file with the (K, S) classes of explicit partitions, relative to the YAML file.
        num_rows: sizes a hash.
        balanced: sizes by ``.balanced``: the least rows in total.
        compression: sizes by ``.for_compression``: at most S / compression rows in total.
        rows: sizes by ``.for_budget``: at most so many rows in total.
        num_partitions: K, beside ``balanced``, ``compression`` or ``rows``; default 2.

    Raises:
        ConfigError: no way of sizing or more than one, or a key that is not of this kind.

    Example:
        >>> PartitionsSpec(kind="chinese_remainder", balanced=True, num_partitions=3).build(1_000_000)
        ChineseRemainder(num_ids=1000000, sizes=[103, 101, 97])
        >>> PartitionsSpec(kind="hash", compression=4.0, rows=500)
        Traceback (most recent call last):
        torchrec_qr.schema.errors.ConfigError: compression, rows; allowed: exactly one of num_rows, compression, rows
    """

    kind: Literal["quotient_remainder", "mixed_radix", "chinese_remainder", "explicit", "hash"]
    num_collisions: int | None = None
    grouping: Grouping | None = None
    sizes: tuple[Annotated[int, Range(1, MAX_NUM_IDS)], ...] | None = None
    file: str | None = None
    num_rows: Annotated[int, Range(1, MAX_NUM_IDS)] | None = None
    balanced: bool = False
    compression: Annotated[float, Range(1)] | None = None
    rows: Annotated[int, Range(1)] | None = None
    num_partitions: Annotated[int, Range(1)] | None = None

    def __post_init__(self) -> None:
        sizings = _SIZINGS[self.kind]
        own = (*sizings, *_OPTIONS.get(self.kind, ()))
        given = [field.name for field in fields(self) if field.name != "kind" and self._has(field.name)]
        for key in given:
            if key not in own:
                value, keys = getattr(self, key), ", ".join(own)
                raise ConfigError(key, value, keys, f"not a key of kind {self.kind!r}, whose keys are {keys}")
        sized_by = [key for key in sizings if key in given]
        if len(sized_by) != 1:
            words = ", ".join(sized_by) or "no size"
            one_of = sizings[0] if len(sizings) == 1 else f"exactly one of {', '.join(sizings)}"
            raise ConfigError("", sized_by, one_of, f"{words}; allowed: {one_of}")
        if self.num_partitions is not None and sized_by[0] == sizings[0]:
            raise ConfigError("num_partitions", self.num_partitions, f"only without {sizings[0]}, which implies it")

    def build(self, num_ids: int, base_dir: str | Path | None = None) -> Partitions:
        """Returns the partitions of ``num_ids`` ids.

        Args:
            num_ids: S.
            base_dir: to which ``file`` is relative; default: the working directory.

        Raises:
            ConfigError: ``file`` is not to be read as an array, or has not S columns.
            TypeError, ValueError: those of the partitions.
        """
        if self.file is not None:
            return _explicit(self.file, num_ids, base_dir)
        cls = _CLASSES[self.kind]
        options = {key: getattr(self, key) for key in _OPTIONS.get(self.kind, ()) if self._has(key)}
        if self.balanced:
            return cls.balanced(num_ids, **options)
        if self.compression is not None:
            return cls.for_compression(num_ids, self.compression, **options)
        if self.rows is not None:
            return cls.for_budget(num_ids, self.rows, **options)
        return cls(num_ids, getattr(self, _SIZINGS[self.kind][0]), **options)

    def _has(self, key: str) -> bool:
        value = getattr(self, key)
        return value is not None and value is not False


def _explicit(file: str, num_ids: int, base_dir: str | Path | None) -> ExplicitPartitions:
    path = Path(base_dir or ".") / file
    allowed = f"a .npy file of integers, of shape (K, {num_ids})"
    try:
        classes = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError("file", file, allowed, f"{file!r} cannot be read: {error}; allowed: {allowed}") from error
    if not isinstance(classes, np.ndarray) or classes.ndim != 2 or classes.shape[1] != num_ids:
        found = f"of shape {classes.shape}" if isinstance(classes, np.ndarray) else "several arrays"
        raise ConfigError("file", file, allowed, f"{file!r} is {found}; allowed: {allowed}")
    return ExplicitPartitions(classes)
