"""The abstract partitions, and those with a closed form."""

from abc import ABC, abstractmethod
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from torchrec_qr.partitions.validation import MAX_NUM_IDS, checked_num_ids

__all__ = ["MAX_NUM_IDS", "ClosedForm", "Partitions"]


class Partitions(ABC):
    """K partitions P_1, ..., P_K of the ids {0, ..., S-1}; p_j(x) is the class, hence the row, of id x in partition j.

    Partitions are *complementary* if no two ids share all K classes, so that composing the K rows of an id can give
    every id an embedding of its own (arXiv:1909.02107, definition 1). Immutable; compared and hashed by meaning.

    Legend of shapes: N ids in a batch, S=|S| logical rows, K partitions, R = Σ_j |P_j| physical rows.

    Ids are taken to lie in [0, S): the collections enforce that, the partitions do not look.

    Attributes:
        num_ids: S, at most 2^40.
        sizes: |P_j|, in the order of the partitions, never reordered.
        kind: the name of the method.

    >>> from torchrec_qr import Partitions, QuotientRemainder
    >>> p: Partitions = QuotientRemainder(1000, num_collisions=10)
    >>> p.sizes, p.num_rows, p.main, p.is_complementary()
    ((100, 10), 110, 0, True)
    """

    kind: ClassVar[str]
    num_ids: int
    sizes: tuple[int, ...]

    def __init__(self, num_ids: int, sizes: tuple[int, ...]) -> None:
        self._set(num_ids=checked_num_ids(type(self).__name__, num_ids), sizes=sizes)

    @property
    def num_partitions(self) -> int:
        """K."""
        return len(self.sizes)

    @property
    def num_rows(self) -> int:
        """R = Σ_j |P_j|."""
        return sum(self.sizes)

    @property
    def main(self) -> int:
        """The index of the partition with most rows, the first of equals."""
        return self.sizes.index(max(self.sizes))

    @property
    def class_map(self) -> Tensor | None:
        """The (K, S) class of every id on the CPU, int32 or int64, for explicit partitions; None for closed forms."""
        return None

    @abstractmethod
    def class_rows(self, ids: Tensor, class_map: Tensor | None = None) -> list[Tensor]:
        """[p_1(ids), ..., p_K(ids)], each int64, of the shape and on the device of `ids`.

        Made of tensor operations alone, so `torch.fx` and `torch.compile` see through it. `ids` are int32 or int64 and
        are cast to int64 before any arithmetic; neither dtype nor range is checked here (`rows` checks the dtype).

        Args:
            ids: ids in [0, S), of any shape.
            class_map: for explicit partitions, a copy of `class_map` on the device of `ids`, which saves moving the map
                on every call; closed forms ignore it.
        """

    def rows(self, ids: Tensor) -> Tensor:
        """rows[n, j] = p_j(ids[n]).

        Args:
            ids: (N,) int32 or int64, in [0, S).

        Returns:
            (N, K) int64, on the device of `ids`.

        Raises:
            TypeError: `ids` are neither int32 nor int64.
            ValueError: `ids` are not one-dimensional.

        >>> from torchrec_qr.partitions import MixedRadix
        >>> MixedRadix(12, [2, 3, 2]).rows(torch.tensor([0, 5, 11])).tolist()
        [[0, 0, 0], [1, 2, 0], [1, 2, 1]]
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{type(self).__name__}: ids must be torch.int32 or torch.int64, got {ids.dtype}")
        if ids.dim() != 1:
            raise ValueError(f"{type(self).__name__}: ids must be one-dimensional, (N,), got shape {tuple(ids.shape)}")
        return torch.stack(self.class_rows(ids), dim=1)

    @abstractmethod
    def is_complementary(self) -> bool:
        """Whether no two ids share all K classes."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """The keyword arguments, beside `num_ids`, that rebuild a closed form; `{"sha256": ...}` of an explicit map."""

    def content_hash(self) -> int:
        """63 bits that tell explicit maps apart, whatever their dtype; 0 for closed forms, told apart by `describe`."""
        return 0

    @abstractmethod
    def _identity(self) -> tuple[object, ...]:
        """All that the rows of an id depend on, for equality and hashing."""

    def _set(self, **fields: object) -> None:
        self.__dict__.update(fields)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot set {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot delete {name}")

    def __copy__(self) -> "Partitions":
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> "Partitions":
        # Modules are deep-copied often, and an explicit map may be large: what cannot change can be shared.
        return self

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Partitions)
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))

    def __repr__(self) -> str:
        arguments = {"num_ids": self.num_ids, **self.describe()}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


class ClosedForm(Partitions):
    """Partitions of the form p_j(x) = (x // strides[j]) % sizes[j], in exact int64 arithmetic.

    The rows lie inside their tables for any integer at all, ids outside [0, S) included.

    Attributes:
        strides: how many consecutive ids share a class before the next class begins; at most S.
    """

    strides: tuple[int, ...]

    def __init__(self, num_ids: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__(num_ids, sizes)
        self._set(strides=strides)

    def class_rows(self, ids: Tensor, class_map: Tensor | None = None) -> list[Tensor]:
        ids = ids.to(torch.int64)
        return [
            (ids if stride == 1 else ids // stride) % size
            for stride, size in zip(self.strides, self.sizes, strict=True)
        ]

    def is_complementary(self) -> bool:
        return True  # the constructors refuse what is not

    def _identity(self) -> tuple[object, ...]:
        return (self.num_ids, self.sizes, self.strides)
