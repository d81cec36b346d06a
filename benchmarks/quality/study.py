"""Runs the cells of the study on worker processes, each result a file: what is there is not run again."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import Cell

_MODULE = "benchmarks.quality.worker"


def result_file(out: Path, cell: Cell, seed: int) -> Path:
    """Returns where a run's numbers lie."""
    return out / "runs" / f"{cell.key}.seed={seed}.json"


def results(out: Path, data: str) -> list[dict[str, Any]]:
    """Returns the numbers of all runs of a data set that are there, and of cells that are impossible."""
    files = sorted((out / "runs").glob(f"{data}.*.json"))
    return [json.loads(file.read_text()) for file in files]


def pending(cells: Iterable[Cell], seeds: int, out: Path) -> list[tuple[Cell, int]]:
    """Returns the runs that have no result: the cells in their order, each with all seeds."""
    todo = []
    for cell in cells:
        first = result_file(out, cell, 0)
        if first.exists() and "impossible" in json.loads(first.read_text()):
            continue
        todo += [(cell, seed) for seed in range(seeds) if not result_file(out, cell, seed).exists()]
    return todo


def run_all(tasks: list[tuple[Cell, int]], out: Path, folder: Path, given: Path, workers: int) -> None:
    """Runs ``tasks`` in their order on ``workers`` processes of one thread, and writes and prints each result.

    A cell that is impossible is written as such, once, in the place of its first seed. A run that fails is printed and
    left for the next time.
    """
    (out / "runs").mkdir(parents=True, exist_ok=True)
    queue, lock = list(reversed(tasks)), threading.Lock()
    impossible: set[Cell] = set()

    def serve(_: int) -> None:
        with _worker() as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None
            while True:
                with lock:
                    if not queue:
                        worker.stdin.close()
                        return
                    cell, seed = queue.pop()
                    if cell in impossible or result_file(out, cell, seed).exists():
                        continue  # the latter: another study on the same folder has run it meanwhile
                task = {"cell": asdict(cell), "seed": seed, "folder": str(folder), "given": str(given)}
                worker.stdin.write(json.dumps(task) + "\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                if not line:
                    raise RuntimeError(f"the worker of {cell.key}, seed {seed}, ended with code {worker.wait()}")
                with lock:
                    _take(json.loads(line), cell, seed, out, impossible)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(serve, range(workers)))


def _take(answer: dict[str, Any], cell: Cell, seed: int, out: Path, impossible: set[Cell]) -> None:
    if "error" in answer or "missing" in answer:
        print(f"{cell.key} seed {seed}: {answer.get('missing') or answer['error']}", flush=True)
        return
    if "impossible" in answer:
        if cell in impossible:
            return
        impossible.add(cell)
        answer, seed = {"cell": asdict(cell), **answer}, 0
        print(f"{cell.key}: impossible: {answer['impossible']}", flush=True)
    else:
        print(f"{cell.key} seed {seed}: logloss {answer['logloss']:.4f} AUC {answer['auc']:.4f}", flush=True)
    file = result_file(out, cell, seed)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(answer, indent=1))
    part.replace(file)


def _worker() -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", _MODULE], stdin=pipe, stdout=pipe, env=environment, text=True)
