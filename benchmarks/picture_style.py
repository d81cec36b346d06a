"""All pictures share this: colours, type, names at the ends of curves, and one SVG that is light or dark by itself."""

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Each colour as drawn, on white, and what takes its place on a dark page. Hues are told apart by the colour-blind too.
PAPER, INK, FAINT, GRID = "#ffffff", "#1f2328", "#59636e", "#d8dee4"
BLUE, ORANGE, GREEN, PURPLE = "#0064b0", "#c04a00", "#007a5e", "#94378e"
_ON_DARK = {
    PAPER: "#0d1117",
    INK: "#e6edf3",
    FAINT: "#9aa4ae",
    GRID: "#30363d",
    BLUE: "#58b2ff",
    ORANGE: "#ff9d4d",
    GREEN: "#3fd6a8",
    PURPLE: "#e39add",
}
METHOD_HUES = {"hash": ORANGE, "mult": BLUE, "mixed_radix_3": GREEN}
METHOD_MARKS = {"hash": "s", "mult": "o", "mixed_radix_3": "^", "full": "D", "natural": "P"}
_FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.facecolor": PAPER,
    "axes.labelcolor": FAINT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": "medium",
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "torchrec_qr",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class End:
    """The end of a curve, at a place in data, and its name."""

    x: float
    y: float
    name: str
    hue: str


def style(size: float) -> Any:
    """Returns the context in which pictures are drawn and saved, with type of ``size`` points."""
    return mpl.rc_context({**_STYLE, "font.size": size, "xtick.labelsize": size, "ytick.labelsize": size})


def save(figure: Figure, file: Path, title: str) -> Path:
    """Writes a picture as SVG, which has both palettes, and closes it.

    A page's or system's preference for dark colours chooses the palette, the ground included: a viewer that ignores it
    shows the light one on white, which reads on any page. Text stays text, in the reader's own font. A warning names
    each text that lies on another or is cut off.
    """
    for crowded in _crowded(figure):
        warnings.warn(f"{file.name}: {crowded}", stacklevel=2)
    drawn = io.StringIO()
    figure.savefig(
        drawn, format="svg", metadata={"Title": title, **dict.fromkeys(("Creator", "Date", "Format", "Type"))}
    )
    plt.close(figure)
    file.write_text(_with_both_palettes(drawn.getvalue()))
    return file


def _crowded(figure: Figure) -> Iterator[str]:
    figure.draw_without_rendering()
    beyond = {label for axes in figure.axes for label in _labels_beyond_limits(axes)}
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text not in beyond]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_visible() and t.get_text()]
    for i, (text, box) in enumerate(boxes):
        for other, other_box in boxes[:i]:
            if box.overlaps(other_box):
                yield f"{text!r} lies on {other!r}"
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1:
            yield f"{text!r} is cut off"


def _labels_beyond_limits(axes: Axes) -> Iterator[Text]:
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                yield tick.label1


def _with_both_palettes(svg: str) -> str:
    rules = [
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in _ON_DARK.items()
        for kind in ("fill", "stroke")
        if f"{kind}: {light}" in svg
    ]
    both = f"text{{font-family:{_FONTS}}}\n@media (prefers-color-scheme:dark){{\n" + "\n".join(rules) + "\n}\n</style>"
    svg = svg.replace("font-family: 'DejaVu Sans'; ", "")
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _rounded, tag[0]), svg)
    svg = re.sub(r"\s+\n", "\n", svg)
    return svg.replace("</style>", both, 1)


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def headed(figure: Figure, title: str, notes: Iterable[str]) -> None:
    """Writes the finding above a picture, and below it how to read it."""
    left, size = 0.012, mpl.rcParams["font.size"]
    line = size * 1.45 / 72 / figure.get_figheight()
    for i, part in enumerate(title.splitlines()):
        figure.text(left, 1 - (i + 0.3) * line * 1.15, part, va="top", weight="bold", size=size * 1.15)
    for i, note in enumerate(reversed(list(notes))):
        figure.text(left, (i + 0.35) * line, note, color=FAINT, size=size * 0.92)


def name_ends(axis: Axes, ends: Sequence[End], side: str = "right") -> None:
    """Names curves beside their ends: the names keep the order of the ends, and none lies on another.

    Call it when the limits and the place of ``axis`` are final.
    """
    gap = mpl.rcParams["font.size"] * 1.25 * axis.figure.dpi / 72
    to_pixels, blocks = axis.transData, []
    for end in sorted(ends, key=lambda e: e.y):
        blocks.append(([end], float(to_pixels.transform((end.x, end.y))[1])))
        while len(blocks) > 1 and blocks[-1][1] - blocks[-2][1] < gap * (len(blocks[-1][0]) + len(blocks[-2][0])) / 2:
            (upper, above), (lower, below) = blocks.pop(), blocks.pop()
            both = [*lower, *upper]
            blocks.append((both, (above * len(upper) + below * len(lower)) / len(both)))
    for members, middle in blocks:
        for i, end in enumerate(members):
            at = float(to_pixels.transform((end.x, end.y))[1])
            moved = middle + gap * (i - (len(members) - 1) / 2) - at
            axis.annotate(
                end.name,
                (end.x, end.y),
                (8 if side == "right" else -8, moved * 72 / axis.figure.dpi),
                textcoords="offset points",
                color=end.hue,
                ha="left" if side == "right" else "right",
                va="center_baseline",
                annotation_clip=False,
            )


def name_over(axis: Axes, end: End, below: bool = False) -> None:
    """Names a point above or below it, where its curve leaves no room beside it."""
    how: Any = {"xytext": (0, -8 if below else 8), "ha": "center", "va": "top" if below else "bottom"}
    axis.annotate(end.name, (end.x, end.y), textcoords="offset points", color=end.hue, **how)


def plain_ticks(axis: Axes, xs: Sequence[float], log: bool = True) -> None:
    """Puts ticks at ``xs``, as plain numbers."""
    if log:
        axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(xs))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
