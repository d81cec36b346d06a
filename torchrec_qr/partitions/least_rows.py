"""Searches for the partition sizes of fewest rows whose product covers S ids."""

import math
from bisect import bisect_left


def even_split(total: int, count: int) -> tuple[int, ...]:
    """`count` sizes that add up to `total`, as equal as can be, the larger first: no split has a larger product."""
    small, larger = divmod(total, count)
    return (small + 1,) * larger + (small,) * (count - larger)


def largest_product(total: int, count: int) -> int:
    """The largest product of `count` sizes that add up to `total`: the product of the even split."""
    small, larger = divmod(total, count)
    return int((small + 1) ** larger * small ** (count - larger))


def least_total(product: int, count: int) -> int:
    """The least Σ m_j of `count` sizes m_j >= 1 with ∏ m_j >= `product`."""
    totals = range(count, product + count)  # the last is (product, 1, ..., 1)
    return totals[bisect_left(totals, product, key=lambda total: largest_product(total, count))]


def largest_main_split(product: int, rows: int, count: int) -> tuple[int, ...]:
    """Of `count` sizes with Σ m_j <= `rows` and ∏ m_j >= `product`, those with the largest first one, the rest least.

    `rows` is at least `least_total(product, count)`. The first size is at most `product`: more rows would lie idle.
    """
    if count == 1:
        return (product,)
    # The others' total, o, leaves rows - o for the first. largest_product(o) · (rows - o) is log-concave in o, so the o
    # that suffice are an interval; the even split of least total marks one of them, and bisection finds its lower end.
    sufficient = sum(even_split(least_total(product, count), count)[1:])
    others = range(count - 1, sufficient + 1)
    rest = others[bisect_left(others, product, key=lambda o: largest_product(o, count - 1) * (rows - o))]
    return (min(rows - rest, product), *even_split(rest, count - 1))


def coprime_split(
    total: int, count: int, product: int, coprime_to: int = 1, cap: int | None = None
) -> list[int] | None:
    """`count` pairwise coprime sizes, also coprime to `coprime_to`, that add up to `total`, with ∏ >= `product`.

    Depth first, the largest size first and from the even split outwards, cut where even the even split of what is left
    would fall short. None if there are none. Sizes are non-increasing and at most `cap`.
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
    """The `count` pairwise coprime sizes of least total with ∏ m_j >= `product`, the largest first."""
    total = least_total(product, count)
    while (sizes := coprime_split(total, count, product)) is None:
        total += 1
    return tuple(sizes)


def largest_main_coprime_split(product: int, rows: int, count: int) -> tuple[int, ...]:
    """As `largest_main_split`, for pairwise coprime sizes; `rows` is at least the total of `least_coprime_split`."""
    main = largest_main_split(product, rows, count)[0]  # an upper bound: it need not mind common factors
    while count > 1:
        needed = -(-product // main)
        for rest in range(least_total(needed, count - 1), rows - main + 1):
            others = coprime_split(rest, count - 1, needed, coprime_to=main)
            if others is not None:
                return (main, *others)
        main -= 1
    return (product,)
