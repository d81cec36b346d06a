"""Partitions that the user supplies, class by class."""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_qr.partitions.base import Partitions
from torchrec_qr.partitions.validation import MAX_NUM_IDS

# Two dense ranks of S ids make a code below S², which int64 must hold.
MAX_EXPLICIT_IDS = 2**31

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_CHUNK = 1 << 20  # ids per step where an array as long as the map would otherwise be doubled


class ExplicitPartitions(Partitions):
    """Partitions given by the class of every id, p_j(x) = classes[j, x]: a car's make, year and type, say.

    |P_j| is the largest class of partition j plus one; a class that no id has is allowed and wastes a row.
    (arXiv:1909.02107, section 3.1: naturally defined partitions.)

    Args:
        classes: (K, S) integers, a tensor or nested sequences. Copied to the CPU, as int32 where that is wide enough.

    Raises:
        TypeError: the classes are not integers.
        ValueError: not two-dimensional or empty, more than 2^31 ids, a class outside [0, 2^40), or two ids that share
            all classes.

    The paper's example, {0, ..., 4} = {0} {1, 3, 4} {2} = {0, 1, 3} {2, 4} = {0, 3} {1, 2, 4}:

    >>> partitions = ExplicitPartitions([[0, 1, 2, 1, 1], [0, 0, 1, 0, 1], [0, 1, 1, 0, 1]])
    >>> partitions.sizes, partitions.rows(torch.tensor([3, 4])).tolist()
    ((3, 2, 2), [[1, 0, 0], [1, 1, 1]])
    """

    kind = "explicit"
    _class_map: Tensor

    def __init__(self, classes: Tensor | npt.NDArray[np.integer] | Sequence[Sequence[int]]) -> None:
        owner = type(self).__name__
        given = _as_cpu_tensor(owner, classes)
        sizes = _checked_sizes(owner, given)
        super().__init__(given.shape[1], sizes)
        dtype = torch.int32 if max(sizes) <= 2**31 else torch.int64
        # A copy always: the caller may go on to change what was given.
        self._set(_class_map=given.detach().to(dtype, copy=True, memory_format=torch.contiguous_format))
        twins = _ids_sharing_all_classes(self._class_map.numpy(), sizes)
        if twins is not None:
            first, second = twins
            raise ValueError(
                f"{owner}: classes must be complementary (no two ids with the same class in every partition), got ids "
                f"{first} and {second} that share all classes {self._class_map[:, first].tolist()}"
            )

    @property
    def class_map(self) -> Tensor:
        """The (K, S) classes on the CPU, int32 where that is wide enough, else int64. Not to be written to."""
        return self._class_map

    def class_rows(self, ids: Tensor, class_map: Tensor | None = None) -> list[Tensor]:
        ids = ids.to(torch.int64)
        classes = self._class_map.to(ids.device) if class_map is None else class_map
        # `index_select` knows a torch.fx.Proxy, which a tensor's __getitem__ does not, and refuses ids outside [0, S).
        flat = ids.reshape(-1)
        return [
            torch.index_select(classes[j], 0, flat).to(torch.int64).reshape_as(ids) for j in range(self.num_partitions)
        ]

    def is_complementary(self) -> bool:
        return True  # the constructor refuses what is not

    def describe(self) -> dict[str, object]:
        return {"sha256": self._sha256}

    def content_hash(self) -> int:
        return int(self._sha256[:16], 16) >> 1

    @cached_property
    def _sha256(self) -> str:
        """Of K, S and the classes as little-endian int64, so that it is the same whatever dtype was given."""
        digest = hashlib.sha256(f"{self.num_partitions},{self.num_ids};".encode())
        for row in self._class_map.numpy():
            for start in range(0, self.num_ids, _CHUNK):
                digest.update(row[start : start + _CHUNK].astype("<i8").tobytes())
        return digest.hexdigest()

    def _identity(self) -> tuple[object, ...]:
        return (self.num_ids, self.sizes, self._sha256)

    def __repr__(self) -> str:
        return f"ExplicitPartitions(num_ids={self.num_ids}, sizes={list(self.sizes)}, sha256='{self._sha256[:12]}…')"


def _as_cpu_tensor(owner: str, classes: object) -> Tensor:
    try:
        # The device is named because a collection may be built under `torch.device("meta")`.
        given = classes.to("cpu") if isinstance(classes, Tensor) else torch.as_tensor(classes, device="cpu")
    except NotImplementedError:
        raise ValueError(f"{owner}: classes must hold values, got a tensor on the meta device") from None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{owner}: classes must be a (K, S) table of integers: {error}") from None
    if given.dim() != 2 or given.numel() == 0:
        raise ValueError(
            f"{owner}: classes must be two-dimensional, (K, S), and not empty, got shape {tuple(given.shape)}"
        )
    if given.dtype not in _INTEGERS:
        allowed = ", ".join(str(dtype) for dtype in _INTEGERS)
        raise TypeError(f"{owner}: classes must have one of the dtypes {allowed}, got {given.dtype}")
    if given.shape[1] > MAX_EXPLICIT_IDS:
        raise ValueError(f"{owner}: num_ids must be at most {MAX_EXPLICIT_IDS} (2^31), got {given.shape[1]}")
    return given


def _checked_sizes(owner: str, classes: Tensor) -> tuple[int, ...]:
    sizes: list[int] = []
    for j, row in enumerate(classes):
        low, high = (int(bound) for bound in torch.aminmax(row))
        if low < 0 or high >= MAX_NUM_IDS:
            value = low if low < 0 else high
            raise ValueError(
                f"{owner}: every class must be between 0 and {MAX_NUM_IDS - 1} (2^40 - 1), got classes[{j}, "
                f"{int((row == value).nonzero()[0])}] = {value}"
            )
        sizes.append(high + 1)
    return tuple(sizes)


def _ids_sharing_all_classes(classes: npt.NDArray[np.integer], sizes: tuple[int, ...]) -> tuple[int, int] | None:
    """The first id, in order, that has all classes of an earlier one, after that earlier one; None if there is none."""
    codes = _codes(classes, sizes)
    codes.sort()
    if not np.any(codes[1:] == codes[:-1]):
        return None
    # The ids behind the codes cost another array or two: found only now that they are needed.
    codes = _codes(classes, sizes)
    order = np.argsort(codes, kind="stable")
    repeated = np.flatnonzero(codes[order[1:]] == codes[order[:-1]])
    position = repeated[np.argmin(order[repeated + 1])]
    return int(order[position]), int(order[position + 1])


def _codes(classes: npt.NDArray[np.integer], sizes: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """One int64 per id, equal for two ids if and only if all their classes are: the digits of a mixed radix."""
    codes: npt.NDArray[np.int64] = classes[0].astype(np.int64)
    bound = sizes[0]  # codes lie in [0, bound)
    for row, size in zip(classes[1:], sizes[1:], strict=True):
        if bound * size > 2**63 and bound > codes.size:
            bound = _rank_densely(codes)
        digits = row
        if bound * size > 2**63:
            digits = row.astype(np.int64)
            size = _rank_densely(digits)
        codes *= size
        codes += digits
        bound *= size
    return codes


def _rank_densely(values: npt.NDArray[np.int64]) -> int:
    """Replaces each value, in place, by its rank among the distinct ones, and returns how many these are."""
    distinct = np.sort(values)
    keep = np.empty(len(distinct), dtype=bool)
    keep[0] = True
    np.not_equal(distinct[1:], distinct[:-1], out=keep[1:])
    distinct = distinct[keep]
    for start in range(0, len(values), _CHUNK):
        values[start : start + _CHUNK] = np.searchsorted(distinct, values[start : start + _CHUNK])
    return len(distinct)
