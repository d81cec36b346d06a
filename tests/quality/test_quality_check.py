"""The regression check of quality: quotient-remainder multiplication beats hashing in as many rows."""

import json
import statistics
from pathlib import Path

import pytest

from benchmarks.quality.cells import Cell
from benchmarks.quality.study import pending, result_file, results, run_all

SEEDS = 3
HASH, MULT = (Cell("generator_check", method, 16) for method in ("hash", "mult"))
REFUSED = Cell("generator_check", "mult", 250)
BASELINES = [Cell("generator_check", method, 16) for method in ("feature_generation", "pool_first")]


@pytest.mark.slow
def test_multiplication_beats_hashing_by_three_times_the_seed_spread(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "data"
    tasks = pending([HASH, MULT, REFUSED], SEEDS, out)
    assert tasks == [(cell, seed) for cell in (HASH, MULT, REFUSED) for seed in range(SEEDS)]
    first, rest = tasks[:1], tasks[1:]
    run_all(first, out, folder, tmp_path, workers=1)  # also makes the data, before two processes would
    before = result_file(out, HASH, 0).stat()
    assert pending([HASH, MULT, REFUSED], SEEDS, out) == rest
    run_all(rest, out, folder, tmp_path, workers=2)

    assert pending([HASH, MULT, REFUSED], SEEDS, out) == []
    assert result_file(out, HASH, 0).stat().st_mtime_ns == before.st_mtime_ns
    assert "ends at" in json.loads(result_file(out, REFUSED, 0).read_text())["impossible"]
    runs = [run for run in results(out, "generator_check") if "impossible" not in run]
    loss = {
        cell.method: [
            run["logloss"] for run in sorted(runs, key=lambda r: r["seed"]) if run["cell"]["method"] == cell.method
        ]
        for cell in (HASH, MULT)
    }
    assert len(loss["hash"]) == len(loss["mult"]) == SEEDS
    rows = {run["cell"]["method"]: run["rows"] for run in runs}
    assert rows["mult"] <= rows["hash"]
    margin = statistics.fmean(loss["hash"]) - statistics.fmean(loss["mult"])
    spread = max(statistics.stdev(values) for values in loss.values())
    assert margin > 3 * spread, (loss, margin, spread)


@pytest.mark.slow
def test_the_papers_baselines_train(tmp_path: Path) -> None:
    run_all([(cell, 0) for cell in BASELINES], tmp_path, tmp_path / "data", tmp_path, workers=1)
    generated, pooled = (json.loads(result_file(tmp_path, cell, 0).read_text()) for cell in BASELINES)
    assert generated["rows"] == pooled["rows"]
    # A model that has learned nothing is at 1.
    assert max(generated["ne"], pooled["ne"]) < 0.75
    assert generated["logloss"] != pooled["logloss"]
