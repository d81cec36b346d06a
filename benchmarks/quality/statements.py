"""What is said of the methods, held against the numbers: by paired differences of test log loss over seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.quality.cells import Cell, Method
from benchmarks.quality.summary import Summary, searched

Outcome = Literal["holds", "does not hold", "undecided", "not run"]

# One-sided 95 % quantiles of Student's t by degrees of freedom.
_T = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}
_OURS: tuple[tuple[Method, str], ...] = (("mult", "QR mult"), ("mixed_radix_3", "mixed radix K=3, mult,"))
# Log losses that differ by less are called equal, as a share of them.
EQUAL = 1e-3


@dataclass(frozen=True)
class Statement:
    """``left`` has a lower test log loss than ``factor`` times that of ``right``.

    Args:
        letter: of the statement that this is a case of.
        text: what is said.
        left: a cell.
        right: a cell.
        factor: 1.003 for "within .3 %".
        tie: says instead that they differ by less than `EQUAL`.
        search: each at the learning rate that validates best.
    """

    letter: str
    text: str
    left: Cell
    right: Cell
    factor: float = 1.0
    tie: bool = False
    search: bool = False


@dataclass(frozen=True)
class Verdict:
    """A statement and what the runs say.

    ``mean`` and ``deviation`` are those of logloss(left) - logloss(right), seed by seed, ``bound`` the half width of
    the interval at 95 % (one-sided) about the mean.
    """

    statement: Statement
    outcome: Outcome
    seeds: int = 0
    mean: float = math.nan
    deviation: float = math.nan
    bound: float = math.nan


def judged(statement: Statement, found: Mapping[Cell, Summary]) -> Verdict:
    """Holds, or does not, where the interval about the mean difference excludes the contrary; else undecided."""
    of = searched if statement.search else Mapping.get
    left, right = of(found, statement.left), of(found, statement.right)
    if left is None or right is None:
        return Verdict(statement, "not run")
    pairs = [(left.runs[s]["logloss"], right.runs[s]["logloss"]) for s in sorted(left.runs.keys() & right.runs.keys())]
    if len(pairs) < 2:
        return Verdict(statement, "not run", len(pairs))
    differences = [a - b for a, b in pairs]
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    bound = half_width(differences)
    level = statistics.fmean(b for _, b in pairs)
    limit = EQUAL * level
    if statement.tie:
        inside, outside = abs(mean) + bound < limit, abs(mean) - bound > 0
    else:
        beyond = mean - (statement.factor - 1) * level
        inside, outside = beyond + bound < 0, beyond - bound > 0
    outcome: Outcome = "holds" if inside else "does not hold" if outside else "undecided"
    return Verdict(statement, outcome, len(pairs), mean, deviation, bound)


def half_width(differences: Sequence[float]) -> float:
    """Returns half the width of the interval at 95 % (one-sided) about the mean of differences, seed by seed."""
    t = _T.get(len(differences) - 1, 1.7)
    return t * statistics.stdev(differences) / math.sqrt(len(differences))


def statements(data: str) -> list[Statement]:
    """Returns what is said of a data set's cells."""
    match data:
        case "criteo":
            return _criteo()
        case "generator_multi_hot":
            return _multi_hot(data)
        case "generator_1e6":
            return [*_against_hashing(data), *_path(data, (16,)), *_init_and_grouping(data), *_searching(data, (60,))]
        case "movielens":
            return [*_against_hashing(data), *_path(data, (16,))]
    return _against_hashing(data)


def _against_hashing(data: str) -> list[Statement]:
    found = []
    for size in (4, 16, 60, 250):
        hashed = Cell(data, "hash", size, threshold=20) if size == 250 else Cell(data, "hash", size)
        for method, name in _OURS:
            ours = replace(hashed, method=method)
            found.append(Statement("a", f"{name} beats hashing at {size}×", ours, hashed))
    full = Cell(data, "full")
    for size in (4, 60):
        found.append(
            Statement("b", f"QR mult at {size}× is within .3 % of full", Cell(data, "mult", size), full, 1.003)
        )
    text = "QR mult at 60× is no worse than hashing at 4×, to .1 %"
    return [*found, Statement("c", text, Cell(data, "mult", 60), Cell(data, "hash", 4), 1 + EQUAL)]


def _criteo() -> list[Statement]:
    mult, hashed = Cell("criteo", "mult", 4), Cell("criteo", "hash", 4)
    found = _against_hashing("criteo")
    adagrad = [mult, Cell("criteo", "full"), hashed, Cell("criteo", "add", 4)]
    amsgrad = [
        (
            f"AMSGrad beats Adagrad for {cell.method}{' at 4×' if cell.compression else ''}",
            replace(cell, optimizer="amsgrad"),
            cell,
        )
        for cell in adagrad
    ]
    found += [Statement("d", *of) for of in amsgrad]
    for cell in adagrad[:3]:
        text = f"rowwise Adagrad is as good as Adagrad for {cell.method}{' at 4×' if cell.compression else ''}, to .1 %"
        found.append(Statement("d", text, replace(cell, optimizer="rowwise_adagrad"), cell, 1 + EQUAL))
    found += [*_path("criteo", (16, 64)), *_init_and_grouping("criteo"), *_searching("criteo", (4, 16, 60))]
    found += [_searched("d", *of) for of in amsgrad[:3]]
    first = {"order": "first_appearance"}
    text = "strided beats hashing at 4×, order of first appearance"
    return [*found, Statement("a", text, replace(mult, order="first_appearance"), replace(hashed, **first))]  # type: ignore[arg-type]


def _path(data: str, widths: tuple[int, ...]) -> list[Statement]:
    mult = Cell(data, "mult", 4 if data == "criteo" else 60)
    paths = [replace(mult, method="path_16" if width == 16 else "path_64") for width in widths]
    return [
        Statement("e", f"QR mult beats path, hidden {width}, at {mult.compression}×", mult, path)
        for width, path in zip(widths, paths, strict=True)
    ]


def _searching(data: str, sizes: tuple[int, ...]) -> list[Statement]:
    found, full = [], Cell(data, "full")
    for size in sizes:
        hashed, mult = Cell(data, "hash", size), Cell(data, "mult", size)
        found += [
            _searched("a", f"{name} beats hashing at {size}×", replace(hashed, method=method), hashed)
            for method, name in _OURS
        ]
        found.append(_searched("b", f"QR mult at {size}× is within .3 % of full", mult, full, 1.003))
        for init in ("identity", "balanced") if data == "criteo" else ():
            text = f"unit init beats {init} at {size}×"
            found.append(_searched("f", text, mult, replace(mult, init=init)))
    return found


def _searched(letter: str, text: str, left: Cell, right: Cell, factor: float = 1.0) -> Statement:
    return Statement(letter, f"{text}, each at its best learning rate", left, right, factor, search=True)


def _init_and_grouping(data: str) -> list[Statement]:
    size = 4 if data == "criteo" else 60
    mult = Cell(data, "mult", size)
    adjacent = replace(mult, grouping="adjacent")
    identity, balanced, dlrm = (replace(mult, init=init) for init in ("identity", "balanced", "dlrm"))
    found = [
        Statement("f", "unit init beats the reference's", mult, dlrm),
        Statement("f", "identity init beats the reference's", identity, dlrm),
        Statement("f", "balanced init beats the reference's", balanced, dlrm),
        Statement("f", "identity init beats balanced", identity, balanced),
        Statement("f", "unit init beats identity", mult, identity),
        Statement("f", "unit init beats balanced", mult, balanced),
        Statement("h", "strided beats adjacent, ids by frequency", mult, adjacent),
    ]
    if data == "criteo":
        a, b = (replace(cell, order="first_appearance") for cell in (mult, adjacent))
        found.append(Statement("h", "strided beats adjacent, ids by first appearance", a, b))
    a, b = (replace(cell, order="random") for cell in (mult, adjacent))
    return [*found, Statement("h", "strided and adjacent tie, ids at random", a, b, tie=True)]


def _multi_hot(data: str) -> list[Statement]:
    found = _against_hashing(data)
    return [s for s in found if s.left.compression in (4, 16) and s.left.method == "mult" and s.letter == "a"] + [
        Statement(
            "g",
            f"composing first beats pooling first at {size}×",
            Cell(data, "mult", size),
            Cell(data, "pool_first", size),
        )
        for size in (4, 16)
    ]


def listed(verdicts: list[Verdict]) -> str:
    """Returns a Markdown table of verdicts."""
    lines = [
        "| | statement | outcome | difference of logloss | spread over seeds | seeds |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for v in verdicts:
        numbers = "| |" if v.outcome == "not run" else f"{v.mean:+.4f} ± {v.bound:.4f} | {v.deviation:.4f} |"
        lines.append(f"| {v.statement.letter} | {v.statement.text} | **{v.outcome}** | {numbers} {v.seeds} |")
    return "\n".join(lines)
