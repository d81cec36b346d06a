"""Chooses an option per table so that the rank with most work has as little of it as can be found.

Spread perfectly, every option costs its mean over ranks, so each table takes its cheapest. What stands against that
are pieces too large to be spread, memory, and what a sharding type takes whatever it is given. So proposals differ in
the largest piece that they allow, in the price of a byte and in their sharding types; each is packed, and the best is
improved table by table.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Proposal:
    """An option per table, where it lies, and what that is rated: less is better."""

    options: list[Option]
    packing: Packing
    rating: float

    @property
    def guide(self) -> float:
        """The rating, with the greatest work replaced by a norm in which all ranks near the greatest count: several
        ranks may share it, so that no one change lowers it.
        """
        greatest = self.packing.greatest
        if not greatest:
            return self.rating
        work = self.packing.work
        mean: float = sum((w / greatest) ** _NORM for w in work) / len(work)
        return self.rating + greatest * (mean ** (1 / _NORM) - 1)


class Search:
    """Looks for the options of least rating.

    Args:
        choices: per table.
        bound: per table, the ranks on which it may lie; None: any.
        cluster: what ranks have room for.
        rate: of a packing, less is better; not below its greatest work.
    """

    def __init__(
        self,
        choices: Sequence[Sequence[Option]],
        bound: Sequence[Sequence[int] | None],
        cluster: Cluster,
        rate: Rate,
    ) -> None:
        self._choices, self._bound, self._cluster, self._rate = choices, bound, cluster, rate
        self._mean = sum(min(o.mean_work for o in options) for options in choices)

    def run(self) -> Proposal | Misfit:
        """Returns the best proposal found, or what did not fit in the most frugal of all."""
        capacity = sum(self._cluster.memory) / self._cluster.world_size
        best = self._cheapest(price=0.0)
        for price in _PRICES:
            if best is not None:
                break
            best = self._cheapest(price * self._mean / capacity)
        if best is None:
            frugal = most_frugal(self._choices, self._bound, self._cluster)
            if isinstance(frugal, Misfit):
                return frugal
            options, packing = frugal
            best = Proposal(options, packing, self._rate(options, packing))
        # Of thousands of tables each is too small to matter, and they are spread well anyway.
        if sum(len(o.blocks) for o in best.options) > _SETTLED:
            return best
        return self._settled(self._of_fewer_types(self._annealed(self._of_fewer_types(best))))

    def _packed(self, options: list[Option]) -> Proposal | None:
        packing = pack(options, self._bound, self._cluster)
        return None if isinstance(packing, Misfit) else Proposal(options, packing, self._rate(options, packing))

    def _cheapest(self, price: float) -> Proposal | None:
        """The best of what each table's cheapest option gives, at a price of memory, for several largest pieces."""
        found: list[Proposal] = []
        seen: set[tuple[int, ...]] = set()
        for largest in _LARGEST_PIECES:
            options = [_cheapest(of_table, largest * self._mean, price) for of_table in self._choices]
            key = tuple(map(id, options))
            if key in seen:
                continue
            seen.add(key)
            proposal = self._packed(options)
            if proposal is not None:
                found.append(proposal)
        return min(found, key=lambda p: p.rating, default=None)

    def _of_fewer_types(self, best: Proposal) -> Proposal:
        """Gives up sharding types, while that makes a plan better: one table after the other has nothing to gain by
        leaving a type that others keep.
        """
        while True:
            kinds = sorted({o.sharding_type for o in best.options})
            fewer = (self._within(best, {k for k in kinds if k != given_up}) for given_up in kinds)
            alone = (self._within(best, {kind}) for kind in kinds)
            found = min(_present([*fewer, *alone]), key=lambda p: p.rating, default=best)
            if found.rating >= best.rating:
                return best
            best = found

    def _within(self, proposal: Proposal, kinds: set[str]) -> Proposal | None:
        """As a proposal, but with the cheapest of options of ``kinds`` for tables that have one."""
        options = []
        for option, of_table in zip(proposal.options, self._choices, strict=True):
            allowed = [o for o in of_table if o.sharding_type in kinds]
            keeps = option.sharding_type in kinds or not allowed
            options.append(option if keeps else min(allowed, key=lambda o: (o.mean_work, o.mean_memory)))
        return self._packed(options)

    def _annealed(self, best: Proposal) -> Proposal:
        """Changes one table at a time, at random, by simulated annealing; returns the best that it comes by.

        The same tables give the same plan: the generator's seed is fixed.
        """
        changeable = [t for t, options in enumerate(self._choices) if len(options) > 1]
        size = sum(len(o.blocks) for o in best.options)
        trials = min(_IMPROVEMENT_BUDGET // size, _TRIALS_PER_TABLE * len(changeable))
        generator = random.Random(0)
        now = best
        for trial in range(trials):
            t = generator.choice(changeable)
            option = generator.choice(self._choices[t])
            changed = self._changed(now, t, option)
            if changed is None:
                continue
            warmth = _WARMTH * (1 - trial / trials)
            guide, guide_now = changed.guide, now.guide
            if guide <= guide_now or (
                warmth and generator.random() < math.exp((guide_now - guide) / (warmth * guide_now))
            ):
                now = changed
                if now.rating < best.rating:
                    best = now
        return best

    def _changed(self, proposal: Proposal, t: int, option: Option) -> Proposal | None:
        if option is proposal.options[t]:
            return None
        return self._packed([*proposal.options[:t], option, *proposal.options[t + 1 :]])

    def _settled(self, best: Proposal) -> Proposal:
        """Gives back what chance changed to no avail: each table its cheapest option where that makes no plan worse."""
        for t in sorted(range(len(self._choices)), key=lambda t: -best.options[t].mean_work):
            for option in sorted(self._choices[t], key=lambda o: o.mean_work):
                if option.mean_work >= best.options[t].mean_work:
                    break
                changed = self._changed(best, t, option)
                if changed is not None and changed.rating <= best.rating:
                    best = changed
                    break
        return best


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


def _cheapest(options: Sequence[Option], largest: float, price: float) -> Option:
    fine = [o for o in options if o.peak_work <= largest]
    if not fine:
        return min(options, key=lambda o: (o.peak_work + price * o.mean_memory, o.mean_work))
    return min(fine, key=lambda o: (o.mean_work + price * o.mean_memory, o.mean_memory))


def _present(proposals: Iterable[Proposal | None]) -> list[Proposal]:
    return [p for p in proposals if p is not None]
