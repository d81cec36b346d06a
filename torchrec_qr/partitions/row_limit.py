"""The least compression that fits: one limit on the rows of every table, as high as possible."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

from torchrec_qr.partitions.quotient_remainder import QuotientRemainder

# Tables of more rows than these shrink, because ⌈2√S⌉ < S.
LEAST_LIMIT = 6


def within_rows(num_embeddings: int, rows: int) -> QuotientRemainder:
    """Returns the quotient-remainder partitions of at most ``rows`` rows, or of the fewest possible."""
    balanced = QuotientRemainder(balanced=True)
    return QuotientRemainder(rows=rows) if rows >= balanced.bind(num_embeddings).num_rows else balanced


def highest_row_limit(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Returns the greatest number of rows C so that tables of min(S, C) rows each fit, or None if no C fits.

    The largest tables are thus compressed first, and alone if that is enough. A table keeps at least the ⌈2√S⌉ rows of
    `within_rows`, also under a lower limit.

    Args:
        sizes (Sequence[int]): S of each table.
        fits (Callable[[int], bool]): whether tables under a limit of so many rows fit. It may be slow.

    Example:
        >>> highest_row_limit([100, 1_000, 1_000_000], lambda limit: 100 + 1_000 + limit <= 250_000)
        248822
    """
    largest = max(sizes)
    if fits(largest):
        return largest
    least = QuotientRemainder(balanced=True).bind(largest).num_rows
    if fits(least):
        # Search to a thousandth, because the exact number of rows would take as many trials again.
        limits: Sequence[int] = [round(least * 1.001**k) for k in range(math.ceil(math.log(largest / least, 1.001)))]
    elif least > LEAST_LIMIT and fits(LEAST_LIMIT):
        limits = range(LEAST_LIMIT, least)
    else:
        return None
    return limits[bisect_left(limits, True, lo=1, key=lambda limit: not fits(limit)) - 1]
