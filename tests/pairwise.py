"""Few cases in which every pair of values of two factors occurs."""

from itertools import combinations
from typing import Any


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Greedy, and the same every time."""
    missing = dict.fromkeys((a, x, b, y) for a, b in combinations(factors, 2) for x in factors[a] for y in factors[b])
    cases = []
    while missing:
        a, x, b, y = next(iter(missing))
        case = {a: x, b: y}
        for name, values in factors.items():
            if name not in case:
                case[name] = max(values, key=lambda v: sum(p in missing for p in _pairs({**case, name: v}, factors)))
        for pair in _pairs(case, factors):
            missing.pop(pair, None)
        cases.append({name: case[name] for name in factors})
    return cases


def _pairs(case: dict[str, Any], factors: dict[str, tuple[Any, ...]]) -> list[tuple[str, Any, str, Any]]:
    known = [name for name in factors if name in case]
    return [(a, case[a], b, case[b]) for a, b in combinations(known, 2)]
