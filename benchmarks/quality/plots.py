"""The study's pictures: log loss by size, by compression and by method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, MultipleLocator

from benchmarks.picture_style import (
    BLUE,
    FAINT,
    GREEN,
    GRID,
    INK,
    METHOD_HUES,
    METHOD_MARKS,
    ORANGE,
    PURPLE,
    End,
    headed,
    name_ends,
    name_over,
    plain_ticks,
    save,
    style,
)
from benchmarks.quality.cells import COMPRESSIONS, Cell
from benchmarks.quality.summary import Summary

Found = Mapping[Cell, Summary]
_NAMES = {
    "full": "full tables",
    "hash": "hashing",
    "mult": "QR, mult",
    "add": "QR, add",
    "concat": "QR, concat",
    "mixed_radix_3": "mixed radix, K = 3",
    "chinese_remainder_2": "Chinese remainder, K = 2",
    "chinese_remainder_3": "Chinese remainder, K = 3",
    "path_16": "path, 16 hidden",
    "path_64": "path, 64 hidden",
    "feature_generation": "feature generation",
    "natural": "natural partitions",
}
_SHORT = {**_NAMES, "mult": "QR", "mixed_radix_3": "K = 3"}
_TITLES = {
    "criteo": "Criteo sample, 280,000 ids",
    "movielens": "MovieLens, a tenth of the users",
    "generator_1e5": "generated, largest table 10⁵ ids",
    "generator_1e6": "generated, largest table 10⁶ ids",
    "generator_1e7": "generated, largest table 10⁷ ids",
    "generator_multi_hot": "generated, ten ids a bag",
}
_LINES = {
    "criteo": ("Criteo", INK, "o"),
    "movielens": ("MovieLens", PURPLE, "P"),
    "generator_1e5": ("10⁵ ids", ORANGE, "s"),
    "generator_1e6": ("10⁶ ids", GREEN, "^"),
    "generator_1e7": ("10⁷ ids", BLUE, "D"),
}
_SIZES = "The smaller the tables, the further quotient-remainder (QR) is ahead of hashing"
_COLLISIONS = "From 16 times fewer parameters on, QR loses less than hashing on every data set"
_OPERATIONS = "At 1/4 of the parameters the best methods are level; at 1/60 those that multiply lead"
_SPREAD = "means of three seeds; bars: ± 1 standard deviation"


def draw(found: Found, folder: Path) -> list[Path]:
    """Writes the pictures for which there are runs; returns their files."""
    with style(9.5):
        drawn = [_sizes(found, folder), _collisions(found, folder), _operations(found, folder)]
    return [file for file in drawn if file is not None]


def curve(found: Found, data: str, method: str) -> list[Summary]:
    """Returns a method's default cells by size, the smallest first."""
    chosen = [
        s
        for cell, s in found.items()
        if (cell.data, cell.method) == (data, method)
        and Cell(data, cell.method, cell.compression, threshold=cell.threshold) == cell
        and (cell.threshold == 200 or cell.compression == 250)
    ]
    return sorted(chosen, key=lambda s: s.of_tables("mib"))


def _sizes(found: Found, folder: Path) -> Path | None:
    names = [name for name in _TITLES if Cell(name, "full") in found and len(curve(found, name, "hash")) > 1]
    if not names:
        return None
    rows = -(-len(names) // 2)
    height = 1.05 + 2.5 * rows
    figure, axes = plt.subplots(rows, 2, figsize=(7.5, height), squeeze=False)
    figure.subplots_adjust(0.075, 0.95 / height, 0.985, 1 - 0.72 / height, wspace=0.2, hspace=0.5)
    for axis, name in zip(axes.flat, names, strict=False):
        _size_panel(axis, found, name)
    for axis in list(axes.flat)[len(names) :]:
        axis.remove()
    notes = [
        f"Test log loss, lower is better: {_SPREAD}. Dashed: full tables.",
        "QR: two partitions under mult; K = 3: mixed radix of three.",
    ]
    headed(figure, _SIZES, notes)
    return save(figure, folder / "quality_size.svg", _SIZES)


def _size_panel(axis: Axes, found: Found, name: str) -> None:
    full = found[Cell(name, "full")]
    axis.axhline(full.mean("logloss"), color=FAINT, lw=1, ls=(0, (4, 3)))
    methods = {"full": INK, "natural": PURPLE, **METHOD_HUES}
    curves = {method: points for method in methods if (points := curve(found, name, method))}
    for method, points in curves.items():
        _draw_curve(axis, points, "mib", methods[method], METHOD_MARKS[method])
    least = min(points[0].of_tables("mib") for points in curves.values())
    most = full.of_tables("mib")
    plain_ticks(axis, [x for x in (0.01, 0.1, 1, 10, 100, 1000) if least / 2 < x < most * 2])
    axis.set(title=_TITLES[name], xlabel="MiB of tables", xlim=(least / (3 * most / least) ** 0.31, most * 3))
    axis.margins(y=0.12)
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.grid(axis="y")
    axis.set_ylim(axis.get_ylim()[0] - 0.12 * (axis.get_ylim()[1] - axis.get_ylim()[0]))
    ends = {m: End(c[0].of_tables("mib"), c[0].mean("logloss"), _SHORT[m], methods[m]) for m, c in curves.items()}
    name_ends(axis, [ends[method] for method in METHOD_HUES if method in ends], side="left")
    name_over(axis, ends["full"], below=True)
    if "natural" in ends:
        name_over(axis, ends["natural"])


def _draw_curve(axis: Axes, points: Sequence[Summary], x: str, hue: str, mark: str) -> None:
    means, spreads = [p.mean("logloss") for p in points], [p.deviation("logloss") for p in points]
    axis.errorbar([p.of_tables(x) for p in points], means, spreads, color=hue, marker=mark, capsize=2)


def _collisions(found: Found, folder: Path) -> Path | None:
    """Draws what is lost against full tables by compression, for hashing and QR, one curve a data set."""
    names = [n for n in _LINES if Cell(n, "full") in found and len(curve(found, n, "mult")) > 1]
    if not names:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 4.1), sharey=True, squeeze=False)
    figure.subplots_adjust(0.055, 0.26, 0.895, 0.81, wspace=0.3)
    drawn: list[tuple[Axes, list[End]]] = []
    for axis, method, title in zip(axes.flat, ("hash", "mult"), ("hashing", "QR, mult"), strict=True):
        ends = []
        for data in names:
            name, hue, mark = _LINES[data]
            points, full = curve(found, data, method), found[Cell(data, "full")].mean("logloss")
            y = [100 * (p.mean("logloss") / full - 1) for p in points]
            spreads = [100 * p.deviation("logloss") / full for p in points]
            x = [p.of_tables("compression") for p in points]
            axis.errorbar(x, y, spreads, color=hue, marker=mark, capsize=2)
            ends.append(End(x[0], y[0], name, hue))
        axis.axhline(0, color=FAINT, lw=1, ls=(0, (4, 3)))
        plain_ticks(axis, COMPRESSIONS)
        axis.set(title=f"{title}: log loss above full tables, %", xlim=(3, 330), xlabel="times fewer parameters")
        axis.grid(axis="y")
        axis.set_ylim(-2, None)
        axis.yaxis.set_major_locator(MultipleLocator(5))
        drawn.append((axis, ends))
    for axis, ends in drawn:
        name_ends(axis, [end for end in ends if end.x > 100])
        for end in ends:
            if end.x < 100:
                name_over(axis, end, below=end.name == "Criteo")
    notes = [f"Lower is better; {_SPREAD}.", "10⁵, 10⁶, 10⁷ ids: generated rows whose largest table has so many."]
    headed(figure, _COLLISIONS, notes)
    return save(figure, folder / "quality_collisions.svg", _COLLISIONS)


def _operations(found: Found, folder: Path) -> Path | None:
    """Draws each method at 4 and 60 times on Criteo, a mark a seed and a bar for the mean."""
    at = {size: {m: s for m in _NAMES if (s := _on_criteo(found, m, size))} for size in (4, 60)}
    if any(len(of_size) < 3 for of_size in at.values()):
        return None
    methods = sorted(
        {**at[4], **at[60]}, key=lambda m: [at[s][m].mean("logloss") if m in at[s] else 1 for s in (60, 4)]
    )
    height = 1.55 + 0.25 * len(methods)
    figure, axes = plt.subplots(1, 2, figsize=(7.5, height), sharey=True)
    figure.subplots_adjust(0.245, 0.9 / height, 0.98, 1 - 0.7 / height, wspace=0.1)
    for axis, (size, of_size) in zip(axes.flat, at.items(), strict=True):
        mean, spread = (of_size["full"].mean("logloss"), of_size["full"].deviation("logloss"))
        axis.axvspan(mean - spread, mean + spread, color=GRID, lw=0)
        for place, method in enumerate(methods):
            _operation_row(axis, of_size.get(method), place)
        axis.set(title=f"1/{size} of the parameters", xlabel="test log loss")
        axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axis.grid(axis="x")
    axes[0].set_yticks(range(len(methods)), [_NAMES[m] for m in methods])
    axes[0].set_ylim(len(methods) - 0.4, -0.6)
    notes = ["Criteo sample, left is better. Dots: seeds; bars: their means; band: full tables ± 1 standard deviation."]
    headed(figure, _OPERATIONS, notes)
    return save(figure, folder / "quality_operation.svg", _OPERATIONS)


def _operation_row(axis: Axes, summary: Summary | None, place: int) -> None:
    if summary is None:
        axis.text(
            0.5,
            place,
            "no run of this size",
            transform=axis.get_yaxis_transform(),
            color=FAINT,
            ha="center",
            va="center",
        )
        return
    hue = METHOD_HUES.get(summary.cell.method, INK)
    how: dict[str, Any] = {"color": hue, "clip_on": False}
    axis.scatter(
        [run["logloss"] for run in summary.runs.values()], [place] * len(summary.runs), s=16, alpha=0.6, lw=0, **how
    )
    axis.plot([summary.mean("logloss")] * 2, [place - 0.32, place + 0.32], lw=2.2, **how)


def _on_criteo(found: Found, method: Any, size: int) -> Summary | None:
    return found.get(Cell("criteo", method, None if method == "full" else size))
