"""The README's two pictures: memory against AUC, and the time of a step against full tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator, NullLocator

from benchmarks.picture_style import (
    BLUE,
    FAINT,
    GRID,
    INK,
    METHOD_HUES,
    METHOD_MARKS,
    ORANGE,
    PAPER,
    PURPLE,
    End,
    headed,
    name_ends,
    plain_ticks,
    save,
    style,
)
from benchmarks.quality.cells import Cell
from benchmarks.quality.plots import curve
from benchmarks.quality.summary import Summary

_MEMORY = (
    "A quarter of the memory costs no AUC that the seeds show.\n"
    "At a sixtieth, quotient-remainder loses less than hashing."
)
_STEP = "On a CPU most steps are shorter than with full tables;\nsmall tables' are not. On an H100 steps were longer."


def draw_memory(found: Mapping[Cell, Summary], folder: Path) -> Path:
    """Draws test AUC against MiB of tables on the Criteo sample; returns the file."""
    with style(10):
        figure, axis = plt.subplots(figsize=(6, 4.3))
        figure.subplots_adjust(left=0.1, right=0.94, top=0.78, bottom=0.26)
        full = found[Cell("criteo", "full")]
        mean, spread = full.mean("auc"), full.deviation("auc")
        axis.axhspan(mean - spread, mean + spread, color=GRID, lw=0)
        axis.axhline(mean, color=FAINT, lw=1, ls=(0, (4, 3)))
        axis.errorbar(full.of_tables("mib"), mean, spread, color=INK, marker=METHOD_MARKS["full"])
        ends = []
        for method, nudge in (("hash", 1.035), ("mult", 1 / 1.035)):
            points = curve(found, "criteo", method)
            x = [p.of_tables("mib") * nudge for p in points]
            y = [p.mean("auc") for p in points]
            hue, mark = METHOD_HUES[method], METHOD_MARKS[method]
            axis.errorbar(x, y, [p.deviation("auc") for p in points], color=hue, marker=mark, capsize=2.5)
            ends.append(End(x[0], y[0], {"hash": "hashing", "mult": "quotient-remainder"}[method], hue))
        plain_ticks(axis, [0.068, 0.285, 1.07, 4.28, 17.1])
        axis.set_xticklabels(["0.07\n1/250", "0.29\n1/60", "1.1\n1/16", "4.3\n1/4", "17 MiB\nfull tables"])
        axis.set(xlim=(0.04, 24), ylim=(0.7235, 0.753), title="test AUC")
        axis.yaxis.set_major_locator(MultipleLocator(0.005))
        axis.yaxis.set_major_formatter("{x:.3f}")
        axis.grid(axis="y")
        axis.annotate("full tables", (0.043, mean), (0, 3), textcoords="offset points")
        _name_memory_curves(axis, ends)
        axis.set_xlabel("memory of all embedding tables, in MiB and as a share")
        notes = [
            "137,000 rows of Criteo, D = 16, one epoch.",
            "Means of three seeds; bars and band: ± 1 standard deviation.",
        ]
        headed(figure, _MEMORY, notes)
        return save(figure, folder / "readme_memory.svg", _MEMORY.replace("\n", " "))


def _name_memory_curves(axis: Axes, ends: list[End]) -> None:
    hashing, ours = ends
    axis.annotate(hashing.name, (hashing.x, hashing.y), (10, -3), textcoords="offset points", color=hashing.hue)
    name_ends(axis, [ours], side="left")


@dataclass(frozen=True)
class _Row:
    """A measured case, its median ratio to full tables, and the least and the largest of the runs."""

    name: str
    median: float
    least: float
    most: float


def draw_step(results: Path, folder: Path) -> Path:
    """Draws the time of a training step as a multiple of that of full tables; returns the file in ``folder``."""
    groups = [
        ("CPU: 26 tables of 200,000 rows", BLUE, _headline(results)),
        ("CPU: 2 tables of 10,000,000 rows", BLUE, _large_tables(results)),
        ("CPU: 10 tables of 16,777 rows, which fit the caches", ORANGE, _suite(results, "2026-11-27_step_dynamicemb")),
        (
            "H100, kernels since rewritten: 10 tables of 1.7 M rows; MLPerf's 26",
            PURPLE,
            [*_suite(results, "2026-11-28_gpu_dynamicemb"), *_suite(results, "2026-11-28_gpu_dlrm")],
        ),
    ]
    with style(10):
        lines = sum(len(rows) + 1.3 for *_, rows in groups)
        figure, axis = plt.subplots(figsize=(6, 1.7 + 0.225 * lines))
        height = figure.get_figheight()
        figure.subplots_adjust(left=0.35, right=0.92, top=1 - 0.66 / height, bottom=0.92 / height)
        axis.set(xlim=(0.3, 4.2), ylim=(lines - 0.6, -0.7))
        axis.grid(axis="x")
        axis.axvline(1, color=INK, lw=1.2)
        place = 0.0
        for title, hue, rows in groups:
            _write_at(axis, title, (-0.593, place), INK, weight="bold", backgroundcolor=PAPER)
            for row in rows:
                place += 1
                _draw_row(axis, row, place, hue)
            place += 1.3
        plain_ticks(axis, [0.5, 1, 2, 4])
        axis.set_xticklabels(["half the time", "as long as\nfull tables", "twice", "4 times"])
        axis.yaxis.set_major_locator(NullLocator())
        axis.spines["left"].set_visible(False)
        notes = [
            "Whole steps with SGD, in full tables' steps. Dots: medians of 3 to 7 runs; lines: range.",
            "First two groups: two ranks, D = 64, uniform ids; others: one rank, D = 128, skewed ids.",
        ]
        headed(figure, _STEP, notes)
        return save(figure, folder / "readme_step.svg", _STEP.replace("\n", " "))


def _draw_row(axis: Axes, row: _Row, place: float, hue: str) -> None:
    _write_at(axis, row.name, (-0.02, place), FAINT, ha="right")
    axis.plot([row.least, row.most], [place, place], color=hue, lw=2.2, alpha=0.5, solid_capstyle="butt")
    axis.plot([row.median], [place], "o", color=hue, ms=6)
    _write_at(axis, f"{row.median:.2f}", (1.02, place), hue)


def _write_at(axis: Axes, text: str, place: tuple[float, float], hue: str, **how: Any) -> None:
    axis.text(*place, text, color=hue, va="center_baseline", transform=axis.get_yaxis_transform(), **how)


def _headline(folder: Path) -> list[_Row]:
    cells = json.loads((folder / "2026-11-28_step_headline.json").read_text())["cells"]
    return [
        _row(_share(200_000, cell["m"]), cell["ids_a_bag"], cell["after"]["median"], cell["after"]["ratios"])
        for cell in cells
    ]


def _large_tables(folder: Path) -> list[_Row]:
    rows = json.loads((folder / "2026-11-25_step_1e7.json").read_text())["rows"]
    chosen = {"variant": "fused", "sharding": "table_wise", "dim": 64, "optimizer": "sgd"}
    return [
        _row(_share(row["num_ids"], row["m"]), row["hot"], row["ratio_to_full"], row["ratio_spread"])
        for row in rows
        if chosen.items() <= row.items()
    ]


def _share(num_ids: int, m: int) -> float:
    return num_ids / (-(-num_ids // m) + m)


def _suite(folder: Path, name: str) -> list[_Row]:
    rows = json.loads((folder / f"{name}.json").read_text())["rows"]
    stored = {row["m"]: row["stored_rows"] for row in rows if row["variant"] == "full"}
    return [
        _row(stored[row["m"]] / row["stored_rows"], row["hot"], row["step"]["to_full"], row["step"]["to_full_spread"])
        for row in rows
        if row["variant"] == "fused"
    ]


def _row(compression: float, ids_per_bag: int | list[int], median: float, ratios: Sequence[float]) -> _Row:
    if isinstance(ids_per_bag, list):
        ids = f"{min(ids_per_bag)}-{max(ids_per_bag)} ids"
    else:
        ids = "1 id" if ids_per_bag == 1 else f"{ids_per_bag} ids"
    return _Row(f"1/{compression:,.0f} of rows, {ids} a bag", median, min(ratios), max(ratios))
