"""Writes what the runs say: a compact file per data set, tables and verdicts in Markdown, and plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.machine import about
from benchmarks.quality.cells import Cell
from benchmarks.quality.plots import draw
from benchmarks.quality.statements import judged, listed, statements
from benchmarks.quality.study import results
from benchmarks.quality.summary import Summary, compact, impossible, search_table, summaries, table


def write_report(out: Path, to: Path, planned: Mapping[str, Sequence[Cell]], seeds: int) -> str:
    """Returns the report in Markdown and writes it, the numbers and the plots to ``to``.

    What is missing of ``planned`` is named, and whatever there is is reported.

    Args:
        out: folder of the study.
        to: folder of the report.
        planned: the cells of each data set.
        seeds: how many each should have.
    """
    to.mkdir(parents=True, exist_ok=True)
    machine, parts, everything = about(), [], {}
    for data, cells in planned.items():
        runs = results(out, data)
        found, refused = summaries(runs), impossible(runs)
        everything.update(found)
        missing = [c.key for c in cells if c not in refused and (c not in found or len(found[c].runs) < seeds)]
        numbers = {
            **machine,
            "data": data,
            "seeds": seeds,
            "runs": [compact(run) for run in runs if "impossible" not in run],
            "impossible": {cell.key: why for cell, why in refused.items()},
            "not_run_with_all_seeds": missing,
        }
        if runs:
            text = json.dumps(numbers, indent=0).replace(',\n"', ', "')
            (to / f"{machine['date']}_quality_{data}.json").write_text(text + "\n")
        parts.append(_section(data, cells, found, refused, missing))
    draw(everything, to)
    report = "\n\n".join(parts) + "\n"
    (to / f"{machine['date']}_quality.md").write_text(report)
    return report


def _section(
    data: str,
    cells: Sequence[Cell],
    found: Mapping[Cell, Summary],
    refused: Mapping[Cell, str],
    missing: Sequence[str],
) -> str:
    verdicts = [judged(statement, found) for statement in statements(data)]
    parts = [f"## {data}", table(found, cells)]
    if (best := search_table(found, cells)) is not None:
        parts.append(f"Each at the learning rate that validates best:\n\n{best}")
    parts.append(listed(verdicts))
    if refused:
        parts.append("Impossible:\n\n" + "\n".join(f"- `{cell.key}`: {why}" for cell, why in refused.items()))
    if missing:
        parts.append("Not run, or not with all seeds: " + ", ".join(f"`{key}`" for key in missing) + ".")
    return "\n\n".join(parts)
