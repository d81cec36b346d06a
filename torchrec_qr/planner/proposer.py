"""Searches for an option per table so that the rank with most work has little of it.

If work could be spread evenly, each table would take the option of least mean work. Three things prevent that: large
blocks, memory, and the fixed cost of a sharding type. So proposals differ in the largest block that they allow, in the
price of a byte and in their sharding types. Each is packed, and the best one is improved table by table.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torchrec_qr.planner.enumerators import Option
from torchrec_qr.planner.partitioner import Cluster, Misfit, Packing, pack

# The largest blocks that proposals allow, in units of the mean work of a rank. Start at hundreds, because a table on
# one host among a thousand ranks has so many.
_LARGEST_PIECES = (math.inf, *(2 * 0.75**i for i in range(-24, 20)))
# The prices of all memory of a rank, in units of the mean work.
_PRICES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e4)
# The blocks that all trials of the improvement may pack.
_IMPROVEMENT_BUDGET = 150_000
_TRIALS_PER_TABLE = 100
# A plan of more blocks is not improved.
_SETTLED = 3000
_NORM = 16
# The relative loss that the first trials accept.
_WARMTH = 0.02

Rate = Callable[[Sequence[Option], Packing], float]


@dataclass(frozen=True)
class Proposal:
    """An option per table, the ranks of their blocks, and a rating, of which less is better."""

    options: list[Option]
    packing: Packing
    rating: float

    @property
    def guide(self) -> float:
        """The rating with a norm in place of the greatest work.

        Several ranks may have the greatest work, so that no single change lowers it. All of them count in the norm.
        """
        greatest = self.packing.greatest
        if not greatest:
            return self.rating
        work = self.packing.work
        mean: float = sum((w / greatest) ** _NORM for w in work) / len(work)
        return self.rating + greatest * (mean ** (1 / _NORM) - 1)


class Search:
    """Searches for the options of least rating.

    Args:
        choices (Sequence[Sequence[Option]]): the options of each table.
        bound (Sequence[Sequence[int] | None]): per table, the ranks that may own it. None means all.
        cluster (Cluster): the memory of the ranks.
        rate (Rate): rates a packing, of which less is better. The rating is at least the greatest work.
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
        """Returns the best proposal found, or a block that does not fit in the proposal of least memory."""
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
        # Stop if there are thousands of blocks, because one is too small to matter and they are spread evenly.
        if sum(len(o.blocks) for o in best.options) > _SETTLED:
            return best
        return self._settled(self._of_fewer_types(self._annealed(self._of_fewer_types(best))))

    def _packed(self, options: list[Option]) -> Proposal | None:
        packing = pack(options, self._bound, self._cluster)
        return None if isinstance(packing, Misfit) else Proposal(options, packing, self._rate(options, packing))

    def _cheapest(self, price: float) -> Proposal | None:
        """Returns the best proposal of cheapest options at a price of memory, over several largest blocks."""
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
        """Removes sharding types while that improves the plan.

        A change of one table cannot, because the other tables keep the type and its fixed cost.
        """
        while True:
            kinds = sorted({o.sharding_type for o in best.options})
            fewer = (self._within(best, {k for k in kinds if k != removed}) for removed in kinds)
            alone = (self._within(best, {kind}) for kind in kinds)
            found = min(_present([*fewer, *alone]), key=lambda p: p.rating, default=best)
            if found.rating >= best.rating:
                return best
            best = found

    def _within(self, proposal: Proposal, kinds: set[str]) -> Proposal | None:
        """Returns a proposal in which tables take their cheapest option of the sharding types ``kinds``, if any."""
        options = []
        for option, of_table in zip(proposal.options, self._choices, strict=True):
            allowed = [o for o in of_table if o.sharding_type in kinds]
            keeps = option.sharding_type in kinds or not allowed
            options.append(option if keeps else min(allowed, key=lambda o: (o.mean_work, o.mean_memory)))
        return self._packed(options)

    def _annealed(self, best: Proposal) -> Proposal:
        """Changes one table at a time, at random, by simulated annealing, and returns the best proposal found.

        The seed is fixed, so that the same tables have the same plan.
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
        """Gives each table its cheapest option again, if that makes the plan no worse."""
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
    """Returns the options of least memory in all, or, if they do not fit, in the smallest blocks."""
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
