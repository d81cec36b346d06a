"""Draws all pictures of the pages from the result files: ``python -m benchmarks.pictures``."""

import argparse
from pathlib import Path

from benchmarks.open_vocabulary.open_page import committed_results, draw_picture
from benchmarks.quality.committed_runs import committed
from benchmarks.quality.plots import draw
from benchmarks.readme_pictures import draw_memory, draw_step

RESULTS = Path(__file__).parent / "results"


def draw_all(results: Path, to: Path) -> list[Path]:
    """Returns the files of all pictures, drawn into ``to`` from the numbers in ``results``."""
    found = committed(results)
    days = draw_picture(committed_results(results), to)
    return [draw_memory(found, to), draw_step(results, to), *draw(found, to), days]


def main() -> None:
    """Draws the pictures and prints their files."""
    parser = argparse.ArgumentParser(prog="benchmarks.pictures", description=__doc__)
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of the pictures (default: that of results)")
    for file in draw_all(RESULTS, parser.parse_args().to):
        print(file)


if __name__ == "__main__":
    main()
