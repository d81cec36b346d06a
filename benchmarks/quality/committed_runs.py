"""The runs of the result files, as summaries."""

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.quality.cells import DATA, Cell
from benchmarks.quality.summary import Summary, summaries


def committed(folder: Path) -> dict[Cell, Summary]:
    """Returns the summary of each cell in the newest file of each data set in ``folder``."""
    found: dict[Cell, Summary] = {}
    for data in DATA:
        for file in sorted(folder.glob(f"*_quality_{data}.json"))[-1:]:
            runs = json.loads(file.read_text())["runs"]
            found |= summaries({**run, "cell": asdict(Cell.of_key(run["cell"]))} for run in runs)
    return found
