"""What compression costs in quality: ``python -m benchmarks.quality``; see docs/quality.md.

It trains the cells of `benchmarks.quality.cells` with several seeds by the job's own trainer, each run on one thread,
and writes tables, statements and plots. What has been run is not run again; ``--report`` runs nothing.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.quality.cells import DATA, Cell, cells, in_order, quick
from benchmarks.quality.datasets import MissingDataError, data_set
from benchmarks.quality.report import write_report
from benchmarks.quality.study import pending, run_all

_KINDS = ("criteo", "movielens", "generator")


def main() -> None:
    """Runs what is pending, then reports."""
    options = _parser().parse_args()
    names = [name for name in DATA if name.split("_")[0] in options.data]
    if options.quick:
        names = [name for name in names if name not in ("generator_1e6", "generator_1e7")]
    chosen = [cell for name in names for cell in quick(name)] if options.quick else in_order(names)
    if not options.report:
        folder = options.folder or Path(tempfile.gettempdir()) / "torchrec_qr_quality"
        chosen = _available(chosen, folder, options.given)
        tasks = pending(chosen, options.seeds, options.out)
        print(f"{len(tasks)} runs pending of {len(chosen)} cells", flush=True)
        run_all(tasks, options.out, folder, options.given, options.workers)
    planned = {name: quick(name) if options.quick else cells(name) for name in names}
    print(write_report(options.out, options.report_to or options.out, planned, options.seeds))


def _available(chosen: list[Cell], folder: Path, given: Path) -> list[Cell]:
    """Makes the data sets, before several workers would, and leaves out the cells of those that are not there."""
    missing = set()
    for name, order in dict.fromkeys((cell.data, cell.order) for cell in chosen):
        try:
            data_set(name, order, folder, given)
        except MissingDataError as error:
            missing.add(name)
            print(f"{name} is left out: {error}", flush=True)
    return [cell for cell in chosen if cell.data not in missing]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="full, hashing and multiplication alone; 5 minutes")
    parser.add_argument("--data", nargs="+", choices=_KINDS, default=list(_KINDS))
    parser.add_argument("--given", type=Path, default=Path("data"), help="folder of the real data (default: data)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quality"), help="folder of results (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="folder of prepared data (default: a temporary one)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes at once (default: %(default)s)")
    parser.add_argument("--report-to", type=Path, help="folder of tables, numbers and plots (default: that of results)")
    parser.add_argument("--report", action="store_true", help="report of what has been run, without running more")
    return parser


if __name__ == "__main__":
    main()
