"""Chooses an option per table so that the rank with most work has as little of it as can be found.

Spread perfectly, every option costs its mean over ranks, so each table takes its cheapest. What stands against that
are pieces too large to be spread, and memory. So proposals differ in the largest piece that they allow and in the
price of a byte; each is packed, and the best is improved table by table.
"""

import math
import random
from collections.abc import Callable, Sequence

from torchrec_qr.planner.enumerators import Option
from torchrec_qr.planner.partitioner import Cluster, Misfit, Packing, pack

# Of the mean work per rank.
_LARGEST_PIECES = (math.inf, *(2 * 0.75**i for i in range(20)))
# Ms for all of a rank's memory, in units of the mean work.
_PRICES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e4)
# Blocks that improvement may place in all.
_IMPROVEMENT_BUDGET = 150_000
_TRIALS_PER_TABLE = 100
_SETTLED = 3000  # blocks of a plan
_NORM = 16
# How much worse, relatively, a plan may be at first.
_WARMTH = 0.02

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
    """Changes one table at a time, at random, by simulated annealing; returns the best by ``rate`` that it comes by.

    What guides it is not the greatest work, which several ranks may share so that no one change lowers it, but a norm
    in which all ranks near the greatest count. The same tables give the same plan: the generator's seed is fixed.
    """
    changeable = [t for t, options in enumerate(choices) if len(options) > 1]
    size = sum(len(o.blocks) for o in chosen)
    # Of thousands of tables each is too small to matter, and they are spread well anyway.
    trials = min(_IMPROVEMENT_BUDGET // size, _TRIALS_PER_TABLE * len(changeable)) if size <= _SETTLED else 0
    generator = random.Random(0)
    best = rating, chosen, packing
    now = _guide(rating, packing)
    for trial in range(trials):
        t = generator.choice(changeable)
        option = generator.choice(choices[t])
        if option is chosen[t]:
            continue
        changed = [*chosen[:t], option, *chosen[t + 1 :]]
        packed = pack(changed, bound, cluster)
        if isinstance(packed, Misfit):
            continue
        rated = rate(changed, packed)
        guided = _guide(rated, packed)
        warmth = _WARMTH * (1 - trial / trials)
        if guided <= now or (warmth and generator.random() < math.exp((now - guided) / (warmth * now))):
            now, chosen = guided, changed
            if rated < best[0]:
                best = rated, changed, packed
    return _settled(choices, bound, cluster, rate, *best) if trials else (chosen, packing)


def _settled(
    choices: Sequence[Sequence[Option]],
    bound: Sequence[Sequence[int] | None],
    cluster: Cluster,
    rate: Rate,
    rating: float,
    chosen: list[Option],
    packing: Packing,
) -> tuple[list[Option], Packing]:
    """Gives back what chance changed to no avail: each table its cheapest option where that makes no plan worse."""
    for t in sorted(range(len(choices)), key=lambda t: -chosen[t].mean_work):
        for option in sorted(choices[t], key=lambda o: o.mean_work):
            if option.mean_work >= chosen[t].mean_work:
                break
            changed = [*chosen[:t], option, *chosen[t + 1 :]]
            packed = pack(changed, bound, cluster)
            if isinstance(packed, Misfit):
                continue
            rated = rate(changed, packed)
            if rated <= rating:
                rating, chosen, packing = rated, changed, packed
                break
    return chosen, packing


def _guide(rating: float, packing: Packing) -> float:
    return _norm(packing) + rating - packing.greatest


def _norm(packing: Packing) -> float:
    greatest = packing.greatest
    if not greatest:
        return 0.0
    mean: float = sum((w / greatest) ** _NORM for w in packing.work) / len(packing.work)
    return greatest * mean ** (1 / _NORM)
