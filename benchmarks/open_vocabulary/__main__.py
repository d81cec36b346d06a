"""Open vocabularies at equal memory: ``python -m benchmarks.open_vocabulary``.

Raw 64-bit ids by hashing, by TorchRec's managed collisions, by a vocabulary and by ``id_hash``: each method trains day
after day, and is tested on each next day. It writes a file per data set and a page with what these say. What has been
run is not run again; ``--report`` runs nothing.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import about
from benchmarks.open_vocabulary.daily_rows import Days, criteo_days, drifting_days
from benchmarks.open_vocabulary.daily_training import run
from benchmarks.open_vocabulary.day_verdicts import chosen_rate
from benchmarks.open_vocabulary.open_methods import BYTES_OF_ROW, ImpossibleMethodError, sharing_ids
from benchmarks.open_vocabulary.open_page import write_page
from launch.process_group import start_process_group
from launch.quiet_stack import silence_the_stack

_RATES = (0.02, 0.05)
# Budgets, as rows of a plain table, and their methods, by data set. `full` has no budget.
_ALL = ("full", "hashing", "id_hash_2", "id_hash_3", "qr_kept", "qr_grown", "zch_distance_lfu", "zch_lru")
_MPZCH = ("mpzch_lru", "mpzch_ttl")
PLANNED: dict[str, list[tuple[int, tuple[str, ...]]]] = {
    "criteo": [(80_000, (*_ALL, *_MPZCH))],
    "drifting": [
        (40_000, (*_ALL, "zch_lfu", "zch_distance_lfu_inherited", *_MPZCH)),
        (160_000, ("hashing", "id_hash_2", "id_hash_3", "zch_distance_lfu")),
        # K=2 has S = 2^40 from 2.1 million rows on. ZCH would sort as many slots every ten batches.
        (2_400_000, ("hashing", "id_hash_2")),
    ],
}


def main() -> None:
    """Runs what is pending, then writes the page."""
    options = _parser().parse_args()
    logging.disable(logging.WARNING)
    silence_the_stack()
    torch.set_num_threads(1)
    if not options.report:
        start_process_group()
        for name in options.data:
            try:
                days = drifting_days() if name == "drifting" else criteo_days(options.given)
            except FileNotFoundError as error:
                print(f"{name} is left out: {error} is not there", flush=True)
                continue
            _run_all(name, days, options.seeds, options.out)
    print(write_page(options.out, options.report_to or options.out))


def _run_all(name: str, days: Days, seeds: int, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}.json"
    results: dict[str, Any] = {"data": name, **days.about, "runs": [], "impossible": {}}
    if file.exists():
        results = json.loads(file.read_text())
    results["sharing"] = _sharing(name, days)
    done = {(r["method"], r["budget"], r["seed"], r["rate"]) for r in results["runs"]}
    for seed in range(seeds):
        for rows, methods in PLANNED[name]:
            budget = rows * BYTES_OF_ROW
            for method in methods:
                if method in results["impossible"]:
                    continue
                same = [r for r in results["runs"] if (r["method"], r["budget"]) == (method, budget)]
                for rate in (chosen_rate(same),) if seed else _RATES:
                    if (method, budget, seed, rate) in done or method in results["impossible"]:
                        continue
                    try:
                        results["runs"].append(run(method, budget, days, seed, rate))
                    except ImpossibleMethodError as error:
                        results["impossible"][method] = str(error)
                    print(name, rows, method, seed, rate, flush=True)
                    _write(file, results)
    _write(file, results)


def _write(file: Path, results: dict[str, Any]) -> None:
    file.write_text(json.dumps({**about(), **results}, indent=1) + "\n")


def _sharing(name: str, days: Days) -> dict[str, dict[str, int]]:
    """Returns, by budget and method, how many ids of all days share an embedding."""
    found: dict[str, dict[str, int]] = {}
    for rows, methods in PLANNED[name]:
        budget = rows * BYTES_OF_ROW
        counts = {method: sharing_ids(method, budget, days) for method in methods}
        found[str(budget)] = {method: count for method, count in counts.items() if count is not None}
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.open_vocabulary", description=__doc__)
    parser.add_argument("--data", nargs="+", choices=list(PLANNED), default=list(PLANNED))
    parser.add_argument("--given", type=Path, default=Path("data"), help="folder of the Criteo sample (default: data)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/open_vocabulary"), help="folder of results (default: %(default)s)"
    )
    parser.add_argument("--report-to", type=Path, help="folder of the page and its numbers (default: that of results)")
    parser.add_argument("--report", action="store_true", help="the page of what has been run, without running more")
    return parser


if __name__ == "__main__":
    main()
