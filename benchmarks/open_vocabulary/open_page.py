"""The page of the study: tables, and what is said of ``id_hash`` held against the numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.open_vocabulary.day_verdicts import SEARCHED_DAYS, Compared, Runs, compared
from benchmarks.open_vocabulary.open_methods import BYTES_OF_ROW, TITLES
from benchmarks.open_vocabulary.open_picture import ALT, draw

OURS = ("id_hash_2", "id_hash_3")
_PHRASES = {"wins": "wins against", "loses": "loses against", "undecided": "is not told apart from"}
_PAGE = "open_vocabulary"
_DATA = {"drifting": "Generated rows", "criteo": "Criteo sample"}
_ABOUT = {
    "drifting": "A tenth of the live ids is new every day; a row has three of them in one feature.",
    "criteo": "A seventh of the rows is a day. Features of up to 2,000 values have a vocabulary and plain tables; the "
    "hashes of the others, with the feature's number in front, are raw ids of one table.",
}


def write_page(out: Path, to: Path) -> str:
    """Returns the page in Markdown, and writes it, its numbers and its picture to ``to``.

    Args:
        out: folder of the runs.
        to: folder of the page.
    """
    to.mkdir(parents=True, exist_ok=True)
    results = [json.loads(file.read_text()) for name in _DATA if (file := out / f"{name}.json").exists()]
    for of in results:
        (to / _name(of)).write_text(json.dumps(of, indent=0).replace(',\n"', ', "').replace(",\n0", ", 0") + "\n")
    draw_picture(results, to)
    page = page_of(results)
    (to / f"{_PAGE}.md").write_text(page)
    return page


def committed_results(folder: Path) -> list[dict[str, Any]]:
    """Returns the newest results of each data set in ``folder``."""
    files = [file for name in _DATA for file in sorted(folder.glob(f"*_{_PAGE}_{name}.json"))[-1:]]
    return [json.loads(file.read_text()) for file in files]


def draw_picture(results: Sequence[Mapping[str, Any]], to: Path) -> Path:
    """Draws the page's picture into the folder ``to``; returns its file."""
    return draw([panel for of in results for panel in _panels(of).values()], to / f"{_PAGE}.svg")


def page_of(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page in Markdown that follows from the results of data sets."""
    parts, said = [], ["## What the numbers say", ""]
    for of in results:
        parts.append(_facts(of))
        for budget, (title, full, found) in _panels(of).items():
            verdicts = {method: _outcomes(method, found) for method in found if method in OURS}
            said.append(f"- {title}: " + " ".join(_sentence(method, of_it) for method, of_it in verdicts.items()))
            parts += [_table(budget, {"full": full, **found}, of["sharing"][str(budget)]), _verdicts(verdicts)]
        if of["impossible"]:
            parts.append(_impossible(of["impossible"]))
    missing = [name for name in _DATA if name not in {of["data"] for of in results}]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    picture = f"![{ALT}]({_PAGE}.svg)"
    return "\n\n".join([_HEAD, "\n".join(said), picture, *parts]) + "\n"


def _name(of: Mapping[str, Any]) -> str:
    return f"{of['date']}_{_PAGE}_{of['data']}.json"


def _panels(of: Mapping[str, Any]) -> dict[int, tuple[str, Runs, Mapping[str, Runs]]]:
    """Returns of each budget a title, the runs of the full table, and those of each method."""
    groups = _grouped(of["runs"])
    full = next(runs for (_, method), runs in groups.items() if method == "full")
    return {
        budget: (
            f"{_DATA[of['data']]}, {budget / 1e6:.0f} MB",
            full,
            {method: runs for (b, method), runs in groups.items() if b == budget},
        )
        for budget in sorted({budget for budget, _ in groups})
    }


def _grouped(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], Runs]:
    keys = dict.fromkeys((run["budget"], run["method"]) for run in runs)
    return {key: Runs([run for run in runs if (run["budget"], run["method"]) == key]) for key in keys}


def _facts(of: Mapping[str, Any]) -> str:
    name = _name(of)
    versions = ", ".join(f"{package} {version}" for package, version in of["versions"].items())
    best = f" The AUC of the true probabilities is {of['best_possible_auc']:.4f}." if "best_possible_auc" in of else ""
    return (
        f"## {_DATA[of['data']]}\n\n"
        f"{_ABOUT[of['data']]} {of['rows_of_a_day']:,} rows a day, {of['ids_of_all_days']:,} ids in all days, "
        f"{100 * of['share_of_lookups_with_ids_of_the_day']:.1f} % of a day's lookups with ids that are new on it."
        f"{best}\n\nNumbers: [{name}]({name}), {of['date']}. {of['processor']}, {of['threads']} "
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


def _outcomes(method: str, found: Mapping[str, Runs]) -> dict[str, Compared | None]:
    """Returns ``method`` compared with each other one of a budget."""
    others = [other for other in TITLES if other in found and other not in (*OURS, "full")]
    return {other: compared(found[method], found[other]) for other in others}


def _verdicts(of_ours: Mapping[str, Mapping[str, Compared | None]]) -> str:
    lines = ["| against | " + " | ".join(TITLES[m] for m in of_ours) + " |", "| --- |" + " --- |" * len(of_ours)]
    for other in next(iter(of_ours.values())):
        found = [outcomes[other] for outcomes in of_ours.values()]
        cells = ["not run" if c is None else f"**{c.outcome}**, {c.mean:+.4f} ± {c.bound:.4f}" for c in found]
        lines.append(f"| {TITLES[other]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sentence(method: str, outcomes: Mapping[str, Compared | None]) -> str:
    by_outcome: dict[str, list[str]] = {}
    for other, difference in outcomes.items():
        if difference is not None:
            by_outcome.setdefault(_PHRASES[difference.outcome], []).append(TITLES[other])
    return (
        f"{TITLES[method]} " + "; ".join(f"{phrase} {', '.join(others)}" for phrase, others in by_outcome.items()) + "."
    )


def _impossible(reasons: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for method, why in reasons.items():
        by_reason.setdefault(why.partition("  (")[0], []).append(TITLES[method])
    return "\n".join(f"Not run here: {', '.join(methods)}. {why}" for why, methods in by_reason.items())


_HEAD = f"""# Open vocabularies at equal memory

`python -m benchmarks.open_vocabulary --given DATA --report-to benchmarks/results` writes this page from its numbers.
Each method trains day d and is then tested on day d + 1, for all days. Its learning rate of Adagrad is the one, of two,
that does better on the first {SEARCHED_DAYS} tested days with seed 0. Log loss and AUC are means over the later days,
± the standard deviation over seeds: of weights, of the order of rows, and of `id_hash`. The model is DLRM, D=16, with
one table for the open features, and plain tables for all others, the same under every method.

*Equal memory* is rows, Adagrad's state of them, and the ids that a method keeps, all in training. A vocabulary counts
8 bytes an id, as in `vocabulary.npz`. ZCH, TorchRec's `MCHManagedCollisionModule`, counts its buffers of ids, places,
counts and times, 24 or 32 bytes a slot, without its history of ten batches. The vocabulary that grows has room for all
ids to come, which nobody knows beforehand. QR takes the most rows of whole collisions that fit, or a plain table if all
ids do. Rows of an evicted id start anew, as in TorchRec's sharded class; its unsharded one leaves them to the new id.
Hashing and `id_hash` keep nothing: no map, no eviction, no state.

*wins* and *loses* are of log loss: the interval at 95 % (one-sided, Student's t) about the mean difference, seed by
seed, excludes the contrary. K=2 has the largest S, a power of four up to 2^40, that its rows allow: 2^40 needs 2.1
million rows. K=3 has S = 2^40, which needs 31,000. *Ids that share* are those of all days that have an embedding in
common with another id for good. Under ZCH all ids without a slot share the last one, and under a vocabulary all unknown
ones share row 0."""
