"""The page of the study: tables, what is said of ``id_hash`` held against the numbers, and a picture."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.open_vocabulary.open_methods import BYTES_OF_ROW, TITLES
from benchmarks.quality.plots import GRID, STYLE, TEXT, label_apart
from benchmarks.quality.statements import half_width

# Tested days by which the learning rate of a method is chosen; the later ones count.
SEARCHED_DAYS = 2
_PAGE = "open_vocabulary"
_mean = statistics.fmean
_TITLES_OF_DATA = {"drifting": "Generated rows, a tenth of the live ids new every day", "criteo": "Criteo sample, raw"}
_HUES = {
    "hashing": "#d9822b",
    "zch_distance_lfu": "#a855f7",
    "qr_kept": "#7d8590",
    "qr_grown": "#3b82f6",
    "id_hash_2": "#22a06b",
    "id_hash_3": "#0e7490",
}


@dataclass(frozen=True)
class Compared:
    """The difference of the mean log loss of two methods, seed by seed; below 0 the left one is better."""

    mean: float
    bound: float

    @property
    def outcome(self) -> str:
        """``wins``, ``loses``, or ``undecided`` where the interval at 95 % (one-sided) has 0 in it."""
        if self.mean + self.bound < 0:
            return "wins"
        return "loses" if self.mean - self.bound > 0 else "undecided"


def chosen_rate(runs: Iterable[Mapping[str, Any]]) -> float:
    """Returns the learning rate that does best on the first tested days, with seed 0, for the later days and seeds."""
    searched = {run["rate"]: _mean(run["logloss"][:SEARCHED_DAYS]) for run in runs if run["seed"] == 0}
    return min(searched, key=lambda rate: searched[rate])


class Runs:
    """The runs of a method in a budget, by seed, at the learning rate that is chosen for it."""

    def __init__(self, runs: Sequence[Mapping[str, Any]]) -> None:
        rate = chosen_rate(runs)
        self.by_seed = {run["seed"]: run for run in runs if run["rate"] == rate}
        self.any = self.by_seed[0]

    def mean(self, number: str) -> tuple[float, float]:
        """Returns the mean over the days after those of the search and over seeds, and the deviation over seeds."""
        values = [_mean(run[number][SEARCHED_DAYS:]) for run in self.by_seed.values()]
        return _mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def by_day(self) -> list[float]:
        """Returns the log loss of each tested day, the mean over seeds."""
        return [_mean(day) for day in zip(*(run["logloss"] for run in self.by_seed.values()), strict=True)]


def compared(left: Runs, right: Runs) -> Compared | None:
    """Returns the comparison of two methods; None if they have less than two seeds in common."""
    seeds = sorted(left.by_seed.keys() & right.by_seed.keys())
    if len(seeds) < 2:
        return None
    pairs = [[runs.by_seed[s]["logloss"][SEARCHED_DAYS:] for runs in (left, right)] for s in seeds]
    differences = [_mean(a) - _mean(b) for a, b in pairs]
    return Compared(_mean(differences), half_width(differences))


def write_page(out: Path, to: Path) -> str:
    """Returns the page in Markdown, and writes it, its numbers and its picture to ``to``.

    Args:
        out: folder of the runs.
        to: folder of the page.
    """
    to.mkdir(parents=True, exist_ok=True)
    results = [json.loads(file.read_text()) for name in _TITLES_OF_DATA if (file := out / f"{name}.json").exists()]
    parts = [_HEAD]
    panels = []
    for of in results:
        name = f"{of['date']}_{_PAGE}_{of['data']}.json"
        (to / name).write_text(json.dumps(of, indent=0).replace(',\n"', ', "').replace(",\n0", ", 0") + "\n")
        groups = _grouped(of["runs"])
        parts.append(_facts(of, name))
        for budget in sorted({budget for budget, _ in groups}):
            found = {method: runs for (b, method), runs in groups.items() if b == budget}
            full = next(runs for (_, method), runs in groups.items() if method == "full")
            parts += [_table(budget, {"full": full, **found}, of["sharing"][str(budget)]), _verdicts(found)]
            panels.append((f"{_TITLES_OF_DATA[of['data']]}, {budget / 1e6:.0f} MB", full, found))
        if of["impossible"]:
            parts.append("\n".join(f"- {TITLES[m]} did not run: `{why}`" for m, why in of["impossible"].items()))
    missing = [name for name in _TITLES_OF_DATA if name not in {of["data"] for of in results}]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    _draw(panels, to)
    parts.insert(1, f"![log loss above that of the full table by day]({_PAGE}.png)")
    page = "\n\n".join(parts) + "\n"
    (to / f"{_PAGE}.md").write_text(page)
    return page


def _grouped(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], Runs]:
    keys = dict.fromkeys((run["budget"], run["method"]) for run in runs)
    return {key: Runs([run for run in runs if (run["budget"], run["method"]) == key]) for key in keys}


def _facts(of: Mapping[str, Any], name: str) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in of["versions"].items())
    best = f" The AUC of the true probabilities is {of['best_possible_auc']:.4f}." if "best_possible_auc" in of else ""
    return (
        f"## {_TITLES_OF_DATA[of['data']]}\n\n"
        f"{of['rows_of_a_day']:,} rows a day, {of['ids_of_all_days']:,} ids in all days, "
        f"{100 * of['share_of_lookups_with_ids_of_the_day']:.1f} % of a day's lookups with ids that are new on it."
        f"{best}\n\nNumbers: [{name}]({name}), {of['date']}, commit {of['commit']}. {of['processor']}, {of['threads']} "
        f"threads, one of them used, load {of['load']}; Python {of['python']}, {versions}."
    )


def _table(budget: int, found: Mapping[str, Runs], sharing: Mapping[str, int]) -> str:
    lines = [
        f"### {budget / 1e6:.2f} MB in training: {budget // BYTES_OF_ROW:,} rows of a plain table with their state",
        "",
        "| method | rate | S | rows | ids that share | MB of rows, ids, in training | log loss | AUC | last day |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | ---: |",
    ]
    for method in TITLES:
        if method in found:
            runs = found[method]
            any_run = runs.any
            loss, auc = (f"{mean:.4f} ± {spread:.4f}" for mean, spread in (runs.mean("logloss"), runs.mean("auc")))
            ids = f"2^{any_run['ids'].bit_length() - 1}" if method.startswith("id_hash") else f"{any_run['ids']:,}"
            sizes = (any_run["table_bytes"], any_run["kept_bytes"], any_run["training_bytes"])
            megabytes = ", ".join(f"{size / 1e6:.2f}" for size in sizes)
            last = f"{runs.by_day()[-1]:.4f}"
            shares = f"{sharing[method]:,}" if method in sharing else ""
            shape = f"{any_run['rate']} | {ids} | {any_run['rows']:,} | {shares}"
            lines.append(f"| {TITLES[method]} | {shape} | {megabytes} | {loss} | {auc} | {last} |")
    return "\n".join(lines)


def _verdicts(found: Mapping[str, Runs]) -> str:
    """Holds ``id_hash`` against every other method of a budget."""
    ours = [method for method in found if method.startswith("id_hash")]
    lines = ["| `id_hash` against | " + " | ".join(TITLES[m] for m in ours) + " |", "| --- |" + " --- |" * len(ours)]
    verdicts: dict[str, dict[str, list[str]]] = {m: {} for m in ours}
    for other in TITLES:
        if other in found and other not in ours and other != "full":
            cells = []
            for method in ours:
                difference = compared(found[method], found[other])
                if difference is None:
                    cells.append("not run")
                    continue
                verdicts[method].setdefault(difference.outcome, []).append(TITLES[other])
                cells.append(f"**{difference.outcome}**, {difference.mean:+.4f} ± {difference.bound:.4f}")
            lines.append(f"| {TITLES[other]} | " + " | ".join(cells) + " |")
    sentences = [
        f"{TITLES[method]} {outcome if outcome != 'undecided' else 'is not told apart from'}"
        f"{' against' if outcome != 'undecided' else ''} {'; '.join(others)}."
        for method, by_outcome in verdicts.items()
        for outcome, others in by_outcome.items()
    ]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in sentences)])


def _draw(panels: Sequence[tuple[str, Runs, Mapping[str, Runs]]], to: Path) -> None:
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
        figure.savefig(to / f"{_PAGE}.png", dpi=160, bbox_inches="tight")
        metadata = {"Date": None}
        figure.savefig(to / f"{_PAGE}.svg", bbox_inches="tight", metadata=metadata)
        plt.close(figure)


_HEAD = f"""# Open vocabularies at equal memory

`python -m benchmarks.open_vocabulary --given DATA --report-to benchmarks/results` writes this page from its numbers.
Each method trains day d and is then tested on day d + 1, for all days. Its learning rate of Adagrad is the one, of two,
that does better on the first {SEARCHED_DAYS} tested days with seed 0. Log loss and AUC are means over the later days,
± the standard deviation over seeds: of weights, of the order of rows, and of `id_hash`. The model is DLRM, D=16, with
one table for the open features, and plain tables for all others, the same under every method.

*Equal memory* is rows, Adagrad's state of them, and the ids that a method keeps, all in training. A vocabulary counts
8 bytes an id, as in `vocabulary.npz`. ZCH, TorchRec's `MCHManagedCollisionModule`, counts its buffers of ids, places,
counts and times, 24 or 32 bytes a slot, without its history of ten batches. The vocabulary that grows has room for all
ids to come, which nobody knows beforehand, and QR takes the most rows of whole collisions that fit. Rows of an evicted
id start anew, as in TorchRec's sharded class, but where the table says otherwise: its unsharded one leaves them.

*wins* and *loses* are of log loss: the interval at 95 % (one-sided, Student's t) about the mean difference, seed by
seed, excludes the contrary. K=2 has the largest S, a power of four up to 2^40, that its rows allow: 2^40 needs 2.1
million rows. K=3 has S = 2^40, which needs 31,000. *Ids that share* are those of all days that have an embedding in
common with another id for good. Under ZCH all ids without a slot share the last one, and under a vocabulary all unknown
ones share row 0."""
