"""Searches for the partition sizes of fewest rows whose product is at least S."""

import math
from bisect import bisect_left


def even_split(total: int, count: int) -> tuple[int, ...]:
    """Returns the split of `total` into `count` sizes of the largest product: nearly equal ones, the larger first."""
    small, larger = divmod(total, count)
    return (small + 1,) * larger + (small,) * (count - larger)


def largest_product(total: int, count: int) -> int:
    """Returns the largest product of `count` sizes that add up to `total`, which the even split has."""
    small, larger = divmod(total, count)
    return int((small + 1) ** larger * small ** (count - larger))


def least_total(product: int, count: int) -> int:
    """Returns the least Σ m_j of `count` sizes m_j >= 1 with ∏ m_j >= `product`."""
    totals = range(count, product + count)  # the last is (product, 1, ..., 1)
    return totals[bisect_left(totals, product, key=lambda total: largest_product(total, count))]


def largest_main_split(product: int, rows: int, count: int) -> tuple[int, ...]:
    """Returns `count` sizes with Σ m_j <= `rows` and ∏ m_j >= `product`: the largest first one, and the least others.

    `rows` must be at least `least_total(product, count)`. The first size is at most `product`, because no id would use
    more rows.
    """
    if count == 1:
        return (product,)
    # The others' total, o, leaves rows - o for the first size. largest_product(o) · (rows - o) is log-concave in o, so
    # the o that suffice are an interval. The even split of least total has one of them, and bisection finds the least.
    sufficient = sum(even_split(least_total(product, count), count)[1:])
    others = range(count - 1, sufficient + 1)
    rest = others[bisect_left(others, product, key=lambda o: largest_product(o, count - 1) * (rows - o))]
    return (min(rows - rest, product), *even_split(rest, count - 1))


def coprime_split(
    total: int, count: int, product: int, coprime_to: int = 1, cap: int | None = None
) -> list[int] | None:
    """Returns `count` pairwise coprime sizes that add up to `total`, with ∏ m_j >= `product`; None if there are none.

    The sizes are non-increasing, at most `cap` and coprime to `coprime_to`. The search is depth first, from the even
    split to larger first sizes. It stops if the even split of the others has too small a product.
    """
    high = total - (count - 1) if cap is None else min(cap, total - (count - 1))
    if count == 1:
        fits = product <= total <= high and math.gcd(total, coprime_to) == 1
        return [total] if fits else None
    for size in range(-(-total // count), high + 1):
        if size * largest_product(total - size, count - 1) < product:
            return None
        if math.gcd(size, coprime_to) == 1:
            rest = coprime_split(total - size, count - 1, -(-product // size), coprime_to * size, size)
            if rest is not None:
                return [size, *rest]
    return None


def least_coprime_split(product: int, count: int) -> tuple[int, ...]:
    """Returns the `count` pairwise coprime sizes of least total with ∏ m_j >= `product`, the largest first."""
    total = least_total(product, count)
    while (sizes := coprime_split(total, count, product)) is None:
        total += 1
    return tuple(sizes)


def largest_main_coprime_split(product: int, rows: int, count: int) -> tuple[int, ...]:
    """Returns what `largest_main_split` does, for pairwise coprime sizes. `rows` must allow `least_coprime_split`."""
    main = largest_main_split(product, rows, count)[0]  # an upper bound, because it may have common factors
    while count > 1:
        needed = -(-product // main)
        for rest in range(least_total(needed, count - 1), rows - main + 1):
            others = coprime_split(rest, count - 1, needed, coprime_to=main)
            if others is not None:
                return (main, *others)
        main -= 1
    return (product,)
