"""What the closed forms share that are given their sizes m_1, ..., m_K."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from torchrec_qr.partitions.base import ClosedForm
from torchrec_qr.partitions.validation import (
    budget_too_small,
    checked_between,
    checked_int,
    checked_num_ids,
    checked_sizes,
    rows_of_ratio,
)


class OfSizes(ClosedForm):
    """Closed forms of which any sizes with ∏ m_j >= S, where `_strides` allows them, tell all ids apart."""

    # Up to how many sizes are searched for; None: any number.
    max_searched: ClassVar[int | None] = None

    def __init__(self, num_ids: int, sizes: Sequence[int]) -> None:
        owner = type(self).__name__
        num_ids, checked = checked_num_ids(owner, num_ids), checked_sizes(owner, sizes)
        strides = self._strides(num_ids, checked)
        product = math.prod(checked)
        if product < num_ids:
            raise ValueError(
                f"{owner}: the product of sizes must be at least num_ids ({num_ids}), got sizes {list(checked)} with "
                f"product {product}: ids 0 and {product} would share all rows"
            )
        super().__init__(num_ids, checked, strides)

    @classmethod
    def balanced(cls, num_ids: int, num_partitions: int = 2) -> Self:
        """The allowed sizes of least total, near S^(1/K) each, the largest first.

        >>> from torchrec_qr.partitions import ChineseRemainder, MixedRadix
        >>> MixedRadix.balanced(1_000_000, num_partitions=3)
        MixedRadix(num_ids=1000000, sizes=[100, 100, 100])
        >>> ChineseRemainder.balanced(1_000_000, num_partitions=3)
        ChineseRemainder(num_ids=1000000, sizes=[103, 101, 97])
        """
        num_ids, count = cls._checked_counts(num_ids, num_partitions)
        return cls(num_ids, cls._least_split(num_ids, count))

    @classmethod
    def for_budget(cls, num_ids: int, rows: int, num_partitions: int = 2) -> Self:
        """At most `rows` rows in total, the first partition as large as they allow: the fewest ids share its rows.

        The first partition has at most S rows; the others have the least total that is possible beside it.

        Raises:
            ValueError: `rows` is below the total of `balanced`.

        >>> from torchrec_qr.partitions import ChineseRemainder, MixedRadix
        >>> MixedRadix.for_budget(1_000_000, rows=10_030, num_partitions=3)
        MixedRadix(num_ids=1000000, sizes=[10010, 10, 10])
        >>> ChineseRemainder.for_budget(1_000_000, rows=10_030, num_partitions=3)
        ChineseRemainder(num_ids=1000000, sizes=[10009, 11, 10])
        """
        num_ids, count = cls._checked_counts(num_ids, num_partitions)
        rows = checked_int(cls.__name__, "rows", rows)
        least = sum(cls._least_split(num_ids, count))
        if rows < least:
            raise budget_too_small(cls.__name__, num_ids, rows, least, count)
        return cls(num_ids, cls._largest_main_split(num_ids, rows, count))

    @classmethod
    def for_compression(cls, num_ids: int, ratio: float, num_partitions: int = 2) -> Self:
        """`for_budget` with ⌊S / ratio⌋ rows, ratio >= 1.

        >>> from torchrec_qr.partitions import MixedRadix
        >>> MixedRadix.for_compression(1_000_000, ratio=4.0)
        MixedRadix(num_ids=1000000, sizes=[249995, 5])
        """
        rows = rows_of_ratio(cls.__name__, num_ids, ratio)
        try:
            return cls.for_budget(num_ids, rows, num_partitions)
        except ValueError as error:
            raise ValueError(f"{error} (ratio {ratio})") from None

    def describe(self) -> dict[str, object]:
        return {"sizes": list(self.sizes)}

    @classmethod
    @abstractmethod
    def _strides(cls, num_ids: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The stride of each partition; ValueError for sizes that are not allowed."""

    @staticmethod
    @abstractmethod
    def _least_split(product: int, count: int) -> tuple[int, ...]:
        """The `count` allowed sizes of least total with ∏ m_j >= `product`."""

    @staticmethod
    @abstractmethod
    def _largest_main_split(product: int, rows: int, count: int) -> tuple[int, ...]:
        """Of `count` allowed sizes of at most `rows` in total, those with the largest first one, the rest least."""

    @classmethod
    def _checked_counts(cls, num_ids: object, num_partitions: object) -> tuple[int, int]:
        owner, hint = cls.__name__, "" if cls.max_searched is None else " (give more sizes to the constructor)"
        count = checked_between(owner, "num_partitions", num_partitions, 1, cls.max_searched, hint)
        return checked_num_ids(owner, num_ids), count
