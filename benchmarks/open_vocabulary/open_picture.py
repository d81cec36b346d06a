"""The picture of the study: log loss above that of the full table, by method and budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

from benchmarks.open_vocabulary.day_verdicts import Runs
from benchmarks.picture_style import BLUE, FAINT, INK, METHOD_HUES, PURPLE, headed, save, style

Panel = tuple[str, Runs, Mapping[str, Runs]]
_TITLE = (
    "Raw ids without a vocabulary: id_hash is as good as hashing, or better.\n"
    "On rows that drift, ZCH, which keeps a map of ids, is better still."
)
ALT = _TITLE.replace("\n", " ")
_METHODS = {
    "hashing": ("hashing", METHOD_HUES["hash"]),
    "id_hash_2": ("id_hash, K = 2", BLUE),
    "id_hash_3": ("id_hash, K = 3", BLUE),
    "zch_distance_lfu": ("ZCH, distance LFU", PURPLE),
    "zch_lru": ("ZCH, LRU", PURPLE),
    "zch_lfu": ("ZCH, LFU", PURPLE),
    "qr_grown": ("QR, vocabulary grows", INK),
    "qr_kept": ("QR, first day's ids", INK),
}


def draw(panels: Sequence[Panel], file: Path) -> Path:
    """Draws each method's log loss above the full table's, seed by seed; returns the file.

    Args:
        panels: of each budget a title, the runs of the full table, and those of each method.
        file: where it is written.
    """
    with style(9.5):
        rows = sum(len(_chosen(panel)) + 1.3 for panel in panels)
        height = 1.55 + 0.215 * rows
        figure, axis = plt.subplots(figsize=(7.5, height))
        figure.subplots_adjust(0.235, 0.95 / height, 0.91, 1 - 0.72 / height)
        axis.axvline(0, color=INK, lw=1.2)
        axis.set_ylim(rows - 0.6, -0.7)
        place, ticks = 0.0, {}
        for panel in panels:
            title, full, found = panel
            axis.text(-0.33, place, title, transform=axis.get_yaxis_transform(), weight="bold", va="center_baseline")
            for method in _chosen(panel):
                place += 1
                name, hue = _METHODS[method]
                ticks[place] = name
                _draw_method(axis, found[method].above(full), place, hue)
            place += 1.3
        axis.set_yticks(list(ticks), list(ticks.values()))
        axis.xaxis.set_major_locator(MultipleLocator(0.005))
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("log loss above that of a full table over a vocabulary that grows")
        axis.grid(axis="x")
        notes = [
            "Equal memory in training within a group, left is better.",
            "Dots: three seeds, each a mean over the later days; bars and numbers: means of the seeds.",
        ]
        headed(figure, _TITLE, notes)
        return save(figure, file, ALT)


def _chosen(panel: Panel) -> list[str]:
    return [method for method in _METHODS if method in panel[2]]


def _draw_method(axis: Axes, differences: Sequence[float], place: float, hue: str) -> None:
    mean = sum(differences) / len(differences)
    axis.scatter(differences, [place] * len(differences), s=16, alpha=0.6, lw=0, color=hue, clip_on=False)
    axis.plot([mean, mean], [place - 0.32, place + 0.32], color=hue, lw=2.2)
    number = f"{round(mean, 4) + 0.0:+.4f}".replace("-", "\N{MINUS SIGN}")
    axis.text(1.01, place, number, transform=axis.get_yaxis_transform(), color=FAINT, va="center_baseline")
