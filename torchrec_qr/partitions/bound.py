"""Partitions of S ids, which `PartitionSpec.bind` returns. They compute the rows of an id."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class BoundPartitions(ABC):
    """K partitions P_1, ..., P_K of the ids {0, ..., S-1}. p_j(x) is the class of id x in partition j, and its row.

    Partitions are *complementary* if no two ids share all K classes. Every id can then have an embedding of its own
    (arXiv:1909.02107, definition 1). If the table hashes ids, that holds for the hashed ids. Objects are immutable.
    Two are equal if all ids have the same rows.

    Legend of shapes: N ids in a batch, S logical rows, K partitions, R = Σ_j |P_j| physical rows.

    Ids must lie in [0, S). The collections check that, and the partitions do not.

    Attributes:
        num_embeddings (int): S, at most 2^40.
        sizes (tuple[int, ...]): |P_j|, in the order of the partitions.

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
        """The number of the partition with most rows, the first one among equals."""
        return self.sizes.index(max(self.sizes))

    @property
    def class_map(self) -> Tensor | None:
        """The class of every id, (K, S) int32 or int64 on the CPU; None for closed forms."""
        return None

    @abstractmethod
    def class_rows(self, ids: Tensor, class_map: Tensor | None = None) -> list[Tensor]:
        """Returns [p_1(ids), ..., p_K(ids)], each int64 with the shape and the device of ``ids``.

        The method consists of tensor operations alone, so that `torch.fx` and `torch.compile` can trace it. It casts
        ids to int64 before any arithmetic, and checks neither dtype nor range.

        Args:
            ids (Tensor): int32 or int64 ids in [0, S), of any shape.
            class_map (Tensor | None): a copy of `class_map` on the device of ``ids``, so that no call copies the map.
                Closed forms ignore it.
        """

    def rows(self, ids: Tensor) -> Tensor:
        """Returns the row of each id in each partition: rows[n, j] = p_j(ids[n]).

        Args:
            ids (Tensor): (N,) int32 or int64, in [0, S).

        Returns:
            Tensor: (N, K) int64, on the device of ``ids``.

        Raises:
            TypeError: ids are neither int32 nor int64.
            ValueError: ids are not one-dimensional.

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
        """Returns whether no two ids share all K classes; if ids are hashed, no two hashed ids."""


def closed_form_rows(ids: Tensor, stride: int, size: int) -> Tensor:
    """Returns (ids // stride) % size of int64 ids, the row of each id in a partition of closed form.

    Example:
        >>> closed_form_rows(torch.tensor([0, 5, 11]), stride=2, size=3).tolist()
        [0, 2, 2]
    """
    return (ids if stride == 1 else ids // stride) % size


def mapped_rows(ids: Tensor, classes: Tensor) -> Tensor:
    """Returns classes[ids] as int64, the row of each id in an explicit partition.

    Args:
        ids (Tensor): int64 ids of any shape.
        classes (Tensor): (S,) int32 or int64, the class of every id.

    Example:
        >>> mapped_rows(torch.tensor([2, 0]), torch.tensor([7, 8, 9])).tolist()
        [9, 7]
    """
    # `index_select` takes a torch.fx.Proxy, which a tensor's __getitem__ does not, and refuses ids outside [0, S).
    return torch.index_select(classes, 0, ids.reshape(-1)).to(torch.int64).reshape_as(ids)


@dataclass(frozen=True)
class ClosedForm(BoundPartitions):
    """Partitions of the form p_j(x) = (x // strides[j]) % sizes[j], in exact int64 arithmetic.

    Every integer has rows inside the tables, also an id outside [0, S).

    Args:
        num_embeddings (int): S.
        sizes (tuple[int, ...]): |P_j|.
        strides (tuple[int, ...]): the number of consecutive ids that share a class, at most S.
    """

    num_embeddings: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def class_rows(self, ids: Tensor, class_map: Tensor | None = None) -> list[Tensor]:
        ids = ids.to(torch.int64)
        return [closed_form_rows(ids, *form) for form in zip(self.strides, self.sizes, strict=True)]

    def is_complementary(self) -> bool:
        # Compare numbers alone, because specs bind only sizes and strides that use every combination of rows.
        return math.prod(self.sizes) >= self.num_embeddings
