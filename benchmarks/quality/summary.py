"""Means over seeds, as rows of a table, and the compact file of a data set's runs."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.quality.cells import Cell, at_rates

Result = Mapping[str, Any]
NUMBERS = ("logloss", "auc", "ne")


@dataclass(frozen=True)
class Summary:
    """The runs of a cell.

    Args:
        cell: what was run.
        runs: by seed.
    """

    cell: Cell
    runs: Mapping[int, Result]

    def mean(self, number: str) -> float:
        return statistics.fmean(run[number] for run in self.runs.values())

    def deviation(self, number: str) -> float:
        """Sample standard deviation over seeds; 0 of a single one."""
        values = [run[number] for run in self.runs.values()]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def of_tables(self, number: str) -> Any:
        """What is the same for all seeds: ``rows``, ``mib``, ``compression``."""
        return next(iter(self.runs.values()))[number]


def summaries(results: Iterable[Result]) -> dict[Cell, Summary]:
    """Returns the summary of each cell that has runs, in their order."""
    runs: dict[Cell, dict[int, Result]] = {}
    for result in results:
        if "impossible" not in result:
            runs.setdefault(Cell.of(result["cell"]), {})[result["seed"]] = result
    return {cell: Summary(cell, dict(sorted(of_cell.items()))) for cell, of_cell in runs.items()}


def searched(found: Mapping[Cell, Summary], cell: Cell) -> Summary | None:
    """Returns the runs at the learning rate with the least mean validation loss; None unless all rates were run."""
    runs = [found[at] for at in at_rates(cell) if at in found]
    return min(runs, key=lambda s: s.mean("validation_logloss")) if len(runs) == len(at_rates(cell)) else None


def search_table(found: Mapping[Cell, Summary], order: Iterable[Cell]) -> str | None:
    """Returns a Markdown table of the cells that were searched, each at its best rate; None if there are none."""
    lines = ["| method | compression | differs in | seeds | logloss | AUC |", "| --- | ---: | --- | ---: | --- | --- |"]
    for cell in order:
        if cell.lr_factor != 1 or (s := searched(found, cell)) is None:
            continue
        numbers = " | ".join(f"{s.mean(n):.4f} ± {s.deviation(n):.4f}" for n in NUMBERS[:2])
        lines.append(f"| {cell.method} | {_compression(cell)} | {difference(s.cell)} | {len(s.runs)} | {numbers} |")
    return "\n".join(lines) if len(lines) > 2 else None


def impossible(results: Iterable[Result]) -> dict[Cell, str]:
    """Returns why cells are impossible."""
    return {Cell.of(r["cell"]): str(r["impossible"]) for r in results if "impossible" in r}


def table(found: Mapping[Cell, Summary], order: Iterable[Cell]) -> str:
    """Returns a Markdown table, mean ± standard deviation over seeds, in the order of ``order``."""
    lines = [
        "| method | compression | differs in | seeds | logloss | AUC | NE | rows | MiB | CPU ms a step |",
        "| --- | ---: | --- | ---: | --- | --- | --- | ---: | ---: | ---: |",
    ]
    for cell in order:
        if (s := found.get(cell)) is None:
            continue
        spread = [f" ± {s.deviation(n):.4f}" if len(s.runs) > 1 else "" for n in NUMBERS]
        numbers = " | ".join(f"{s.mean(n):.4f}{plus}" for n, plus in zip(NUMBERS, spread, strict=True))
        size = f"{s.of_tables('rows'):,} | {s.of_tables('mib'):.2f}"
        steps = f"{s.mean('cpu_ms_per_step'):.0f}"
        about = f"{cell.method} | {_compression(cell)} | {difference(cell)} | {len(s.runs)}"
        lines.append(f"| {about} | {numbers} | {size} | {steps} |")
    return "\n".join(lines)


def _compression(cell: Cell) -> str:
    return "" if cell.compression is None else f"{cell.compression}×"


def difference(cell: Cell) -> str:
    """Returns in what a cell differs from the default of its method and compression.

    Example:
        >>> difference(Cell("criteo", "mult", 4, init="balanced", order="random"))
        'init balanced, order random'
    """
    plain = asdict(Cell(cell.data, cell.method, cell.compression))
    changed = [(name, value) for name, value in asdict(cell).items() if value != plain[name]]
    return ", ".join(f"{name.replace('_', ' ')} {str(value).replace('_', ' ')}" for name, value in changed)


def compact(result: Result) -> dict[str, Any]:
    """Returns a run as the result file has it: its cell's key in place of all fields, numbers to six digits."""
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in result.items() if k != "cell"}
    return {"cell": Cell.of(result["cell"]).key, **rounded}
