"""Plots of the study as PNG and SVG, on no background: their greys and hues read on white and on black."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.cells import Cell
from benchmarks.quality.summary import Summary

TEXT, GRID = "#7d8590", "#7d859040"
_HUES = {"hash": "#d9822b", "mult": "#3b82f6", "mixed_radix_3": "#22a06b"}
_NAMES = {
    "full": "full tables",
    "hash": "hashing",
    "mult": "QR, mult",
    "add": "QR, add",
    "concat": "QR, concat",
    "mixed_radix_3": "mixed radix K=3",
    "chinese_remainder_2": "Chinese remainder K=2, mult",
    "chinese_remainder_3": "Chinese remainder K=3, mult",
    "path_16": "path, hidden 16",
    "path_64": "path, hidden 64",
    "feature_generation": "feature generation",
    "natural": "natural partitions",
}
_TITLES = {
    "criteo": "Criteo sample, 280 thousand ids",
    "movielens": "MovieLens, a tenth of the users",
    "generator_1e5": "generated, 10⁵ ids in the largest table",
    "generator_1e6": "generated, 10⁶ ids",
    "generator_1e7": "generated, 10⁷ ids",
    "generator_multi_hot": "generated, ten ids a bag",
}
STYLE: Any = {
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "font.size": 9,
    "savefig.transparent": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "quality",
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}


def draw(found: Mapping[Cell, Summary], folder: Path) -> list[Path]:
    """Writes the plots for which there are runs; returns their PNG files."""
    written = []
    with mpl.rc_context(STYLE):
        for name, figure in (
            ("quality_size", _sizes(found)),
            ("quality_collisions", _collisions(found)),
            ("quality_operation", _operations(found)),
        ):
            if figure is None:
                continue
            for suffix in ("png", "svg"):
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(folder / f"{name}.{suffix}", dpi=160, bbox_inches="tight", metadata=metadata)
            plt.close(figure)
            written.append(folder / f"{name}.png")
    return written


def curve(found: Mapping[Cell, Summary], data: str, method: str) -> list[Summary]:
    """Returns a method's default cells by size, the smallest first."""
    chosen = [
        s
        for cell, s in found.items()
        if (cell.data, cell.method) == (data, method)
        and Cell(data, cell.method, cell.compression, threshold=cell.threshold) == cell
        and (cell.threshold == 200 or cell.compression == 250)
    ]
    return sorted(chosen, key=lambda s: s.of_tables("mib"))


def _sizes(found: Mapping[Cell, Summary]) -> Figure | None:
    names = [name for name in _TITLES if len(curve(found, name, "hash")) > 1]
    if not names:
        return None
    rows = -(-len(names) // 2)
    columns = min(2, len(names))
    figure, axes = plt.subplots(rows, columns, figsize=(4.8 * columns, 3.1 * rows), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        _size_panel(axis, found, name)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    figure.tight_layout()
    return figure


def _size_panel(axis: Axes, found: Mapping[Cell, Summary], name: str) -> None:
    for method, hue in _HUES.items():
        points = curve(found, name, method)
        if points:
            x, y = [p.of_tables("mib") for p in points], [p.mean("logloss") for p in points]
            axis.errorbar(x, y, [p.deviation("logloss") for p in points], color=hue, marker="o", ms=4, lw=1.5)
    for method, mark in (("full", "s"), ("natural", "D")):
        for p in curve(found, name, method):
            axis.errorbar(p.of_tables("mib"), p.mean("logloss"), p.deviation("logloss"), color=TEXT, marker=mark, ms=5)
            _label(axis, p, _NAMES[method], TEXT, above=method == "natural")
    _label_lines(axis, found, name)
    axis.set_xscale("log")
    axis.margins(x=0.15, y=0.15)
    left, right = axis.get_xlim()
    axis.set_xlim(left / 9, right)  # room for names
    axis.set(title=_TITLES[name], xlabel="MiB of tables", ylabel="test log loss")
    axis.grid(color=GRID, lw=0.5)


def _label(axis: Axes, point: Summary, text: str, hue: str, above: bool = True) -> None:
    x, y = point.of_tables("mib"), point.mean("logloss")
    axis.annotate(text, (x, y), (0, 7 if above else -14), textcoords="offset points", color=hue, ha="center")


def _label_lines(axis: Axes, found: Mapping[Cell, Summary], name: str) -> None:
    """Names each line at its smallest point: the upper one above it, the others where no line runs, to its left."""
    ends = [(curve(found, name, method), method) for method in _HUES]
    ends = sorted(((c, m) for c, m in ends if c), key=lambda end: -end[0][0].mean("logloss"))
    for place, (points, method) in enumerate(ends):
        xy = (points[0].of_tables("mib"), points[0].mean("logloss"))
        offset, side = ((6, 4), "left") if place == 0 else ((-6, 3 if place == 1 else -12), "right")
        axis.annotate(_NAMES[method], xy, offset, textcoords="offset points", color=_HUES[method], ha=side)


def _collisions(found: Mapping[Cell, Summary]) -> Figure | None:
    """What is lost against full tables by compression, for hashing and multiplication, one line a data set."""
    names = [n for n in _TITLES if Cell(n, "full") in found and len(curve(found, n, "mult")) > 1]
    if not names:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.4), sharey=True, squeeze=False)
    shades = plt.get_cmap("plasma")
    for axis, method in zip(axes.flat, ("hash", "mult"), strict=True):
        ends = []
        for i, name in enumerate(names):
            full = found[Cell(name, "full")].mean("logloss")
            points = curve(found, name, method)
            x = [p.of_tables("compression") for p in points]
            y = [100 * (p.mean("logloss") / full - 1) for p in points]
            hue = shades(0.4 + 0.4 * i / max(len(names) - 1, 1))
            axis.plot(x, y, marker="o", ms=4, lw=1.5, color=hue)
            ends.append((y[0], x[0], name.replace("_", " "), hue))
        label_apart(axis, ends)
        axis.axhline(0, color=TEXT, lw=0.8)
        axis.set_xscale("log")
        axis.margins(x=0.25)
        axis.set(title=_NAMES[method], xlabel="logical / stored parameters", ylabel="log loss above full tables, %")
        axis.grid(color=GRID, lw=0.5)
    figure.tight_layout()
    return figure


def label_apart(axis: Axes, ends: list[tuple[float, float, str, Any]]) -> None:
    """Names lines to the right of their ends (y, x, name, hue), so that no two names lie on one another."""
    low, high = axis.get_ylim()
    gap, free = (high - low) / 18, -math.inf
    for y, x, name, hue in sorted(ends):
        free = max(y, free + gap)
        axis.annotate(name, (x, free), (6, -3), textcoords="offset points", color=hue, annotation_clip=False)


def _operations(found: Mapping[Cell, Summary]) -> Figure | None:
    """Each method at 4 and 60 times on Criteo, a dot a seed and a bar for the mean."""
    panels = [(size, _by_method(found, size)) for size in (4, 60)]
    panels = [(size, points) for size, points in panels if len(points) > 2]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.4), squeeze=False)
    for axis, (size, points) in zip(axes.flat, panels, strict=True):
        for place, p in enumerate(points):
            hue = _HUES.get(p.cell.method, TEXT)
            axis.scatter([r["logloss"] for r in p.runs.values()], [place] * len(p.runs), s=14, color=hue, alpha=0.7)
            axis.scatter([p.mean("logloss")], [place], marker="|", s=160, color=hue)
        axis.set_yticks(range(len(points)), [_NAMES[p.cell.method] for p in points])
        axis.set(title=f"Criteo sample, {size} times fewer parameters", xlabel="test log loss")
        axis.grid(color=GRID, lw=0.5, axis="x")
    figure.tight_layout()
    return figure


def _by_method(found: Mapping[Cell, Summary], size: int) -> Sequence[Summary]:
    cells = [Cell("criteo", "full"), *(Cell("criteo", m, size) for m in _NAMES)]  # type: ignore[arg-type]
    return sorted((found[c] for c in cells if c in found), key=lambda s: -s.mean("logloss"))
