"""Few cases in which every pair of values of two factors occurs."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

Factors = dict[str, tuple[Any, ...]]
Case = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def pairwise(factors: Factors, possible: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Greedy, and the same every time. ``possible`` decides on cases of which some factors may be missing."""
    missing = dict.fromkeys(all_pairs(factors, possible))
    cases = []
    while missing:
        a, x, b, y = next(iter(missing))
        case = {a: x, b: y}
        for name in factors:
            if name not in case:
                allowed = [v for v in factors[name] if possible({**case, name: v})]
                case[name] = max(allowed, key=lambda v: sum(p in missing for p in pairs_of({**case, name: v}, factors)))
        for pair in pairs_of(case, factors):
            missing.pop(pair, None)
        cases.append({name: case[name] for name in factors})
    return cases


def all_pairs(factors: Factors, possible: Callable[[Case], bool] = lambda case: True) -> list[Pair]:
    pairs = [(a, x, b, y) for a, b in combinations(factors, 2) for x in factors[a] for y in factors[b]]
    return [(a, x, b, y) for a, x, b, y in pairs if possible({a: x, b: y})]


def pairs_of(case: Case, factors: Factors) -> list[Pair]:
    known = [name for name in factors if name in case]
    return [(a, case[a], b, case[b]) for a, b in combinations(known, 2)]
