"""The class map of explicit partitions, and its copies on devices."""

import hashlib
from functools import cached_property
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_qr.partitions.bound import BoundPartitions, mapped_rows
from torchrec_qr.partitions.checks import MAX_NUM_EMBEDDINGS

# Work on so many ids at a time, because a second array of the map's length may not fit.
_CHUNK = 1 << 20


class ClassMap(BoundPartitions):
    """Complementary partitions p_j(x) = classes[j, x]. |P_j| is the largest class of partition j plus one.

    Args:
        owner (str): the first word of error messages.
        classes (Tensor): (K, S) int32 or int64 on the CPU, contiguous. Nobody may write to it.

    Raises:
        ValueError: a class lies outside [0, 2^40), or two ids share all classes.
    """

    def __init__(self, owner: str, classes: Tensor) -> None:
        self.num_embeddings = classes.shape[1]
        self.sizes = _sizes(owner, classes)
        self._class_map = classes
        twins = _ids_sharing_all_classes(classes.numpy(), self.sizes)
        if twins is not None:
            first, second = twins
            raise ValueError(
                f"{owner}: classes must be complementary (no two ids with the same class in every partition), got ids "
                f"{first} and {second} that share all classes {classes[:, first].tolist()}"
            )

    @property
    def class_map(self) -> Tensor:
        """The classes, (K, S) on the CPU. Nobody may write to them."""
        return self._class_map

    def class_rows(self, ids: Tensor, class_map: Tensor | None = None) -> list[Tensor]:
        ids = ids.to(torch.int64)
        classes = self._class_map.to(ids.device) if class_map is None else class_map
        return [mapped_rows(ids, classes[j]) for j in range(self.num_partitions)]

    def is_complementary(self) -> bool:
        return True  # the constructor refuses other maps

    @cached_property
    def sha256(self) -> str:
        """The hash of K, S and the classes as little-endian int64, which does not depend on the dtype."""
        digest = hashlib.sha256(f"{self.num_partitions},{self.num_embeddings};".encode())
        for row in self._class_map.numpy():
            for start in range(0, self.num_embeddings, _CHUNK):
                digest.update(row[start : start + _CHUNK].astype("<i8").tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.sha256 == other.sha256 if isinstance(other, ClassMap) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __deepcopy__(self, memo: dict[int, object]) -> "ClassMap":
        # Share the map, because modules are deep-copied often and it may be large.
        return self

    def __repr__(self) -> str:
        return f"ClassMap(num_embeddings={self.num_embeddings}, sizes={self.sizes}, sha256='{self.sha256[:12]}…')"


# The copies by device. Weak references keep none of them alive.
_copies: WeakKeyDictionary[BoundPartitions, WeakValueDictionary[torch.device, Tensor]] = WeakKeyDictionary()


def class_map_on(partitions: BoundPartitions, device: torch.device | None) -> Tensor | None:
    """Returns the class map of ``partitions`` on a device, one copy per map and device in a process.

    Args:
        partitions (BoundPartitions): the partitions. Equal ones share the copy, and nobody may write to it.
        device (torch.device | None): the device. Default: the CPU.

    Returns:
        Tensor | None: (K, S) int32 or int64; None for closed forms.

    Example:
        >>> from torchrec_qr import ExplicitPartitions
        >>> bound = ExplicitPartitions([[0, 0, 1], [0, 1, 1]]).bind(3)
        >>> class_map_on(bound, torch.device("meta")) is class_map_on(bound, torch.device("meta"))
        False
        >>> class_map_on(bound, None) is bound.class_map
        True
    """
    class_map = partitions.class_map
    if class_map is None or device is None or device == class_map.device:
        return class_map
    if device.type == "meta":
        return class_map.to(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    copies = _copies.setdefault(partitions, WeakValueDictionary())
    copy = copies.get(device)
    if copy is None:
        copies[device] = copy = class_map.to(device)
    return copy


def _sizes(owner: str, classes: Tensor) -> tuple[int, ...]:
    sizes: list[int] = []
    for j, row in enumerate(classes):
        low, high = (int(bound) for bound in torch.aminmax(row))
        if low < 0 or high >= MAX_NUM_EMBEDDINGS:
            value = low if low < 0 else high
            raise ValueError(
                f"{owner}: every class must be between 0 and {MAX_NUM_EMBEDDINGS - 1} (2^40 - 1), got classes[{j}, "
                f"{int((row == value).nonzero()[0])}] = {value}"
            )
        sizes.append(high + 1)
    return tuple(sizes)


def _ids_sharing_all_classes(classes: npt.NDArray[np.integer], sizes: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the least id that has all classes of an earlier id, behind that one; None if there is none."""
    codes = _codes(classes, sizes)
    codes.sort()
    if not np.any(codes[1:] == codes[:-1]):
        return None
    # Find the ids of the codes only now, because they take one or two more arrays.
    codes = _codes(classes, sizes)
    order = np.argsort(codes, kind="stable")
    repeated = np.flatnonzero(codes[order[1:]] == codes[order[:-1]])
    position = repeated[np.argmin(order[repeated + 1])]
    return int(order[position]), int(order[position + 1])


def _codes(classes: npt.NDArray[np.integer], sizes: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Returns an int64 code per id, a number in a mixed radix. Two ids have one code if they share all classes."""
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
    """Replaces each value in place by its rank among the distinct values, and returns the number of these."""
    distinct = np.sort(values)
    keep = np.empty(len(distinct), dtype=bool)
    keep[0] = True
    np.not_equal(distinct[1:], distinct[:-1], out=keep[1:])
    distinct = distinct[keep]
    for start in range(0, len(values), _CHUNK):
        values[start : start + _CHUNK] = np.searchsorted(distinct, values[start : start + _CHUNK])
    return len(distinct)
