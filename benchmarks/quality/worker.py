"""A process that trains runs: one per line of its input, each answered by a line."""

import gc
import json
import logging
import sys
import traceback
from pathlib import Path

from benchmarks.quality.cells import Cell
from benchmarks.quality.datasets import MissingDataError
from benchmarks.quality.method_tables import ImpossibleCellError
from benchmarks.quality.run import run
from launch.process_group import start_process_group
from launch.quiet_stack import silence_the_stack


def main() -> None:
    """Reads ``{"cell", "seed", "folder", "given"}``; answers a result, or ``impossible``, ``missing`` or ``error``."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what others print is no answer
    logging.disable(logging.WARNING)
    silence_the_stack()
    device = start_process_group()
    for line in sys.stdin:
        task = json.loads(line)
        cell = Cell.of(task["cell"])
        try:
            answer = run(cell, task["seed"], Path(task["folder"]), Path(task["given"]), device)
        except ImpossibleCellError as error:
            answer = {"impossible": str(error)}
        except MissingDataError as error:
            answer = {"missing": str(error)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        gc.collect()


if __name__ == "__main__":
    main()
