"""Chooses an option per table so that the rank with most work has as little of it as can be found.

Spread perfectly, every option costs its mean over ranks, so each table takes its cheapest. What stands against that
are pieces too large to be spread, and memory. So proposals differ in the largest piece that they allow and in the
price of a byte; each is packed, and the best is improved table by table.
"""

import math
from collections.abc import Callable, Sequence

from torchrec_qr.planner.enumerators import Option
from torchrec_qr.planner.partitioner import Cluster, Misfit, Packing, pack

# Of the mean work per rank.
_LARGEST_PIECES = (math.inf, 1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
# Ms for all of a rank's memory, in units of the mean work.
_PRICES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e4)
# Blocks that improvement may place in all: it is for few tables, many are spread well anyway.
_IMPROVEMENT_BUDGET = 200_000

Rate = Callable[[Sequence[Option], Packing], float]


def propose(
    choices: Sequence[Sequence[Option]], bound: Sequence[Sequence[int] | None], cluster: Cluster, rate: Rate
) -> tuple[list[Option], Packing] | Misfit:
    """Returns an option per table and where it lies, or what did not fit in the most frugal of all proposals.

    Args:
        choices: per table.
        bound: per table, the ranks on which it may lie; None: any.
        rate: of a packing, less is better; not below its greatest work.
    """
    mean = sum(min(o.mean_work for o in options) for options in choices)
    capacity = sum(cluster.memory) / cluster.world_size
    best = _best(choices, bound, cluster, rate, mean, price=0.0)
    for price in _PRICES:
        if best is not None:
            break
        best = _best(choices, bound, cluster, rate, mean, price * mean / capacity)
    if best is None:
        frugal = most_frugal(choices, bound, cluster)
        if isinstance(frugal, Misfit):
            return frugal
        best = rate(*frugal), *frugal
    return _improved(choices, bound, cluster, rate, *best)


def _best(
    choices: Sequence[Sequence[Option]],
    bound: Sequence[Sequence[int] | None],
    cluster: Cluster,
    rate: Rate,
    mean: float,
    price: float,
) -> tuple[float, list[Option], Packing] | None:
    best: tuple[float, list[Option], Packing] | None = None
    seen: set[tuple[int, ...]] = set()
    for largest in _LARGEST_PIECES:
        chosen = [_cheapest(options, largest * mean, price) for options in choices]
        key = tuple(map(id, chosen))
        if key in seen:
            continue
        seen.add(key)
        packing = pack(chosen, bound, cluster)
        if isinstance(packing, Misfit):
            continue
        rating = rate(chosen, packing)
        if best is None or rating < best[0]:
            best = rating, chosen, packing
    return best


def _cheapest(options: Sequence[Option], largest: float, price: float) -> Option:
    fine = [o for o in options if o.peak_work <= largest]
    if not fine:
        return min(options, key=lambda o: (o.peak_work + price * o.mean_memory, o.mean_work))
    return min(fine, key=lambda o: (o.mean_work + price * o.mean_memory, o.mean_memory))


def most_frugal(
    choices: Sequence[Sequence[Option]], bound: Sequence[Sequence[int] | None], cluster: Cluster
) -> tuple[list[Option], Packing] | Misfit:
    """Least memory in all, and if that does not fit, in the smallest pieces."""
    least = [min(options, key=lambda o: (o.mean_memory, o.peak_memory)) for options in choices]
    finest = [min(options, key=lambda o: (o.peak_memory, o.mean_memory)) for options in choices]
    capacity = min(cluster.memory)
    mixed = [a if a.peak_memory <= 0.5 * capacity else b for a, b in zip(least, finest, strict=True)]
    misfit: Misfit | None = None
    for chosen in (least, mixed, finest):
        packing = pack(chosen, bound, cluster, by_memory=True)
        if not isinstance(packing, Misfit):
            return chosen, packing
        misfit = misfit or packing
    assert misfit is not None
    return misfit


def _improved(
    choices: Sequence[Sequence[Option]],
    bound: Sequence[Sequence[int] | None],
    cluster: Cluster,
    rate: Rate,
    rating: float,
    chosen: list[Option],
    packing: Packing,
) -> tuple[list[Option], Packing]:
    """Changes one table at a time, of those on the rank with most work, while that helps and the budget lasts."""
    budget = _IMPROVEMENT_BUDGET
    size = sum(len(o.blocks) for o in chosen)
    while True:
        greatest = max(range(cluster.world_size), key=packing.work.__getitem__)
        better: tuple[float, list[Option], Packing] | None = None
        for t in _tables_on(greatest, chosen, packing):
            for option in choices[t]:
                if option is chosen[t]:
                    continue
                budget -= size
                if budget < 0:
                    return (better[1], better[2]) if better is not None else (chosen, packing)
                trial = [*chosen[:t], option, *chosen[t + 1 :]]
                packed = pack(trial, bound, cluster)
                if isinstance(packed, Misfit):
                    continue
                rated = rate(trial, packed)
                if rated < (rating if better is None else better[0]) * (1 - 1e-9):
                    better = rated, trial, packed
        if better is None:
            return chosen, packing
        rating, chosen, packing = better


def _tables_on(rank: int, chosen: Sequence[Option], packing: Packing) -> list[int]:
    """Tables that burden a rank, those with the largest pieces first."""
    there = [
        t
        for t, placed in enumerate(packing.placed)
        if any(ranks is None or rank in ranks for ranks in placed) or chosen[t].everywhere.work_ms
    ]
    return sorted(there, key=lambda t: (-max(block.work_ms for block in chosen[t].blocks), t))
