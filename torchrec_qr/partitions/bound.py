"""Partitions of S ids: what `PartitionSpec.bind` returns, and what computes the rows of an id."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class BoundPartitions(ABC):
    """K partitions P_1, ..., P_K of the ids {0, ..., S-1}; p_j(x) is the class, hence the row, of id x in partition j.

    Partitions are *complementary* if no two ids share all K classes, so that composing the K rows of an id can give
    every id an embedding of its own (arXiv:1909.02107, definition 1). Immutable; compared and hashed by the rows of
    their ids.

    Legend of shapes: N ids in a batch, S logical rows, K partitions, R = Σ_j |P_j| physical rows.

    Ids are taken to lie in [0, S): the collections enforce that, the partitions do not look.

    Attributes:
        num_embeddings (int): S, at most 2^40.
        sizes (tuple[int, ...]): |P_j|, in the order of the partitions, never reordered.

    Example:
        >>> from torchrec_qr import QuotientRemainder
        >>> bound = QuotientRemainder(num_collisions=10).bind(1000)
        >>> bound.sizes, bound.num_rows, bound.main, bound.is_complementary()
        ((100, 10), 110, 0, True)
    """

    num_embeddings: int
    sizes: tuple[int, ...]

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
        """Returns [p_1(ids), ..., p_K(ids)], each int64, of the shape and on the device of ``ids``.

        Made of tensor operations alone, so `torch.fx` and `torch.compile` see through it. The ids are cast to int64
        before any arithmetic; neither dtype nor range is checked here (`rows` checks the dtype).

        Args:
            ids (Tensor): int32 or int64 ids in [0, S), of any shape.
            class_map (Tensor | None): for explicit partitions, a copy of `class_map` on the device of ``ids``, which
                saves moving the map on every call; closed forms ignore it.
        """

    def rows(self, ids: Tensor) -> Tensor:
        """Returns the row of each id in each partition: rows[n, j] = p_j(ids[n]).

        Args:
            ids (Tensor): (N,) int32 or int64, in [0, S).

        Returns:
            Tensor: (N, K) int64, on the device of ``ids``.

        Raises:
            TypeError: ``ids`` are neither int32 nor int64.
            ValueError: ``ids`` are not one-dimensional.

        Example:
            >>> from torchrec_qr import MixedRadix
            >>> MixedRadix(sizes=[2, 3, 2]).bind(12).rows(torch.tensor([0, 5, 11])).tolist()
            [[0, 0, 0], [1, 2, 0], [1, 2, 1]]
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{type(self).__name__}: ids must be torch.int32 or torch.int64, got {ids.dtype}")
        if ids.dim() != 1:
            raise ValueError(f"{type(self).__name__}: ids must be one-dimensional, (N,), got shape {tuple(ids.shape)}")
        return torch.stack(self.class_rows(ids), dim=1)

    @abstractmethod
    def is_complementary(self) -> bool:
        """Returns whether no two ids share all K classes."""


@dataclass(frozen=True)
class ClosedForm(BoundPartitions):
    """Partitions of the form p_j(x) = (x // strides[j]) % sizes[j], in exact int64 arithmetic.

    The rows lie inside their tables for any integer at all, ids outside [0, S) included.

    Args:
        num_embeddings (int): S.
        sizes (tuple[int, ...]): |P_j|.
        strides (tuple[int, ...]): how many consecutive ids share a class before the next class begins; at most S.
    """

    num_embeddings: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def class_rows(self, ids: Tensor, class_map: Tensor | None = None) -> list[Tensor]:
        ids = ids.to(torch.int64)
        return [
            (ids if stride == 1 else ids // stride) % size
            for stride, size in zip(self.strides, self.sizes, strict=True)
        ]

    def is_complementary(self) -> bool:
        # Enough rows are enough, because specs bind only such sizes and strides as use every combination of rows.
        return math.prod(self.sizes) >= self.num_embeddings
