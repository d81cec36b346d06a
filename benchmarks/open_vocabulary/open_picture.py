"""The picture of the study: log loss by day."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.open_vocabulary.day_verdicts import Runs
from benchmarks.open_vocabulary.open_methods import TITLES
from benchmarks.quality.plots import GRID, STYLE, TEXT, label_apart

_HUES = {
    "hashing": "#d9822b",
    "zch_distance_lfu": "#a855f7",
    "qr_kept": "#7d8590",
    "qr_grown": "#3b82f6",
    "id_hash_2": "#22a06b",
    "id_hash_3": "#0e7490",
}


def draw(panels: Sequence[tuple[str, Runs, Mapping[str, Runs]]], stem: Path) -> None:
    """Draws the log loss of each tested day above that of the full table."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.4), squeeze=False)
        for axis, (title, full, found) in zip(axes.flat, panels, strict=True):
            ends: list[tuple[float, float, str, Any]] = []
            for method, hue in _HUES.items():
                if method in found:
                    y = [a - b for a, b in zip(found[method].by_day(), full.by_day(), strict=True)]
                    x = [2 + i for i in range(len(y))]
                    axis.plot(x, y, marker="o", ms=4, lw=1.5, color=hue)
                    ends.append((y[-1], x[-1], TITLES[method].replace("`", ""), hue))
            label_apart(axis, ends)
            axis.axhline(0, color=TEXT, lw=0.8)
            axis.set(title=title, xlabel="tested day", ylabel="log loss above the full table's")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(color=GRID, lw=0.5)
        figure.tight_layout()
        figure.savefig(stem.with_suffix(".png"), dpi=160, bbox_inches="tight")
        metadata = {"Date": None}
        figure.savefig(stem.with_suffix(".svg"), bbox_inches="tight", metadata=metadata)
        plt.close(figure)
