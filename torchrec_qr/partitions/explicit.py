"""Partitions that a user supplies, class by class."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_qr.partitions.checks import checked_num_embeddings
from torchrec_qr.partitions.class_map import ClassMap
from torchrec_qr.partitions.spec import PartitionSpec

# Codes of two dense ranks of S ids then fit int64, because they are below S².
MAX_EXPLICIT_IDS = 2**31

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class ExplicitPartitions(PartitionSpec):
    """Partitions given by the class of every id, p_j(x) = classes[j, x], such as a car's make, year and type.

    |P_j| is the largest class of partition j plus one. A class without ids wastes a row
    (arXiv:1909.02107, section 3.1: naturally defined partitions).

    Args:
        classes (Tensor | ndarray | Sequence[Sequence[int]] | None): (K, S) integers, of which the spec keeps a copy on
            the CPU.
        file (str | None): a .npy file with the classes. The first ``bind`` reads it.

    Raises:
        TypeError: the classes are not integers.
        ValueError: not exactly one of the two is given, the classes are empty or not two-dimensional, or there are more
            than 2^31 ids.

    Example:
        The paper's {0, ..., 4} = {0} {1, 3, 4} {2} = {0, 1, 3} {2, 4} = {0, 3} {1, 2, 4}:

        >>> bound = ExplicitPartitions([[0, 1, 2, 1, 1], [0, 0, 1, 0, 1], [0, 1, 1, 0, 1]]).bind(5)
        >>> bound.sizes, bound.rows(torch.tensor([3, 4])).tolist()
        ((3, 2, 2), [[1, 0, 0], [1, 1, 1]])
    """

    kind = "explicit"

    # YAML has no classes, because programs have them as arrays.
    classes: Tensor | npt.NDArray[np.integer] | Sequence[Sequence[int]] | None = field(
        default=None, metadata={"in_yaml": False}
    )
    file: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._check_sized_once(("classes", "file"))
        if self.classes is not None:
            # Keep a copy, because the caller may change the array later.
            object.__setattr__(self, "classes", _copied(type(self).__name__, self.classes))

    def bind(self, num_embeddings: int) -> ClassMap:
        s = checked_num_embeddings(type(self).__name__, num_embeddings)
        if (columns := self._bound.num_embeddings) != s:
            source = "classes" if self.file is None else f"file {self.file!r}"
            raise ValueError(f"{type(self).__name__}: num_embeddings must be {columns}, the ids of {source}, got {s}")
        return self._bound

    @cached_property
    def _bound(self) -> ClassMap:
        # Bind once, because many tables may share the spec, and the check of a large map takes seconds.
        owner = type(self).__name__
        classes = self.classes if self.file is None else _read(owner, self.file)
        assert isinstance(classes, Tensor)
        return ClassMap(owner, classes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExplicitPartitions):
            return NotImplemented
        if isinstance(self.classes, Tensor) and isinstance(other.classes, Tensor):
            return torch.equal(self.classes, other.classes)
        return self.file is not None and self.file == other.file

    def __hash__(self) -> int:
        return hash(tuple(self.classes.shape) if isinstance(self.classes, Tensor) else self.file)

    def __deepcopy__(self, memo: dict[int, object]) -> "ExplicitPartitions":
        # Share the map, because configs are deep-copied often and it may be large.
        return self

    def __repr__(self) -> str:
        if isinstance(self.classes, Tensor):
            return f"ExplicitPartitions(classes of shape {tuple(self.classes.shape)})"
        return f"ExplicitPartitions(file={self.file!r})"


def _read(owner: str, file: str) -> Tensor:
    allowed = "a .npy file of integers, of shape (K, S)"
    try:
        classes = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{owner}: file {file!r} cannot be read: {error}; allowed: {allowed}") from error
    if not isinstance(classes, np.ndarray):
        raise ValueError(f"{owner}: file {file!r} holds several arrays; allowed: {allowed}")
    return _copied(owner, classes)


def _copied(owner: str, classes: object) -> Tensor:
    """Returns a contiguous copy on the CPU, as int32 if all classes fit, else as int64."""
    try:
        # Name the device, because a collection may be built under `torch.device("meta")`.
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
        raise ValueError(f"{owner}: num_embeddings must be at most {MAX_EXPLICIT_IDS} (2^31), got {given.shape[1]}")
    low, high = (int(bound) for bound in torch.aminmax(given))
    limits = torch.iinfo(torch.int32)
    dtype = torch.int32 if limits.min <= low and high <= limits.max else torch.int64
    return given.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
