"""Times of a step of embeddings, from ids to stepped rows: ``torchrun ... -m benchmarks.step --suite NAME``.

It uses the ranks that it is started with, each with a GPU of its own where there are any, else with gloo. The suites:

- headline: uncompressed tables, TorchRec's stock parts, dlrm's QR bag, and ours, all table-wise;
- grid: uncompressed tables and ours, of many widths and sizes, under several shardings;
- hosts: where bytes between hosts decide;
- nodes: tables over all ranks against a copy per node and a copy per rank;
- dlrm: MLPerf's 26 tables, by the plans of TorchRec's planner and of ours;
- dynamicemb: 10 tables and Zipf's ids, as NVIDIA's dynamicemb is measured;
- tbe: our lookup against FBGEMM's of full tables, on one rank.

Without torchrun, headline and grid start two ranks on this machine, hosts starts two in network namespaces (root),
nodes two in each of two namespaces, and the others run on one. Variants of a cell take turns, so that a ratio to full
tables holds on a busy machine. Before and after, a step of each is compared with float64: one whose values are wrong
gets no times, and the exit code is 1.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.bridged_hosts import bridged_hosts
from benchmarks.local_ranks import THIS_HOST, run_ranks
from benchmarks.machine import about
from benchmarks.step_device import copy_gb_s
from benchmarks.step_plan import device_name, memory_gib
from benchmarks.step_rank import measure
from benchmarks.step_suites import SUITES, cells_of
from benchmarks.step_variants import VARIANTS
from launch.process_group import start_process_group

_LOCAL_RANKS = 2
# Options that not all suites have.
_OF_SUITES = {
    "quick": ("headline",),
    "rate": ("hosts", "nodes"),
    "dims": ("headline", "grid", "tbe"),
    "num_ids": ("headline", "grid", "tbe"),
    "shardings": ("grid",),
    "max_gib": ("grid", "dlrm", "tbe"),
    "max_rows": ("dlrm",),
    "scale": ("dynamicemb",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures a suite, prints a line per row, and returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parsed(argv)
    if "RANK" not in os.environ and options.suite in ("headline", "grid", "hosts", "nodes"):
        return _on_this_machine(options, argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    device = start_process_group()
    try:
        return _as_rank(options, device)
    finally:
        dist.destroy_process_group()


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="headline")
    parser.add_argument("--json", type=Path, help="rank 0 writes the rows to this file, anew after each")
    parser.add_argument("--runs", type=_positive, help="default: 5, --quick: 1")
    parser.add_argument("--steps", type=_positive, default=11, help="timed steps per run and variant")
    parser.add_argument("--bags", type=_positive, help="local batch; default: 2048, nodes: 2048 and 16384")
    parser.add_argument("--zipf", type=_not_negative, help="exponent of ids; default: 0, dlrm, dynamicemb, nodes: 1.05")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="of those of the suite; default: all")
    parser.add_argument("--quick", action="store_true", default=None, help="headline: full and fused, SGD; a minute")
    parser.add_argument("--dims", nargs="+", type=_positive, help="headline, grid, tbe: D")
    parser.add_argument("--num-ids", nargs="+", type=_positive, help="headline, grid, tbe: S of all tables")
    parser.add_argument("--shardings", nargs="+", choices=("table_wise", "column_wise", "data_parallel"), help="grid")
    parser.add_argument(
        "--max-gib", type=float, help="grid, dlrm, tbe: full tables on a rank; default: 40 %% of memory"
    )
    parser.add_argument("--max-rows", type=_positive, help="dlrm: of a table; default: by --max-gib")
    parser.add_argument("--scale", type=_positive_float, help="dynamicemb: of rows and batch; default: 1, CPU: 0.01")
    parser.add_argument("--rate", help="hosts and nodes, without torchrun: of the link, as tc takes it; default: 1gbit")
    options = parser.parse_args(argv)
    for name, suites in _OF_SUITES.items():
        if getattr(options, name) is not None and options.suite not in suites:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} with --suite {options.suite}; allowed: with {', '.join(suites)}")
    return options


def _on_this_machine(options: argparse.Namespace, argv: Sequence[str]) -> int:
    command = [sys.executable, "-m", "benchmarks.step", *argv]
    gpus = torch.cuda.device_count()
    ranks = min(_LOCAL_RANKS, gpus) if gpus else _LOCAL_RANKS
    if options.suite not in ("hosts", "nodes"):
        return run_ranks(command, [THIS_HOST], ranks)[0]
    with bridged_hosts(2, options.rate or "1gbit") as hosts:
        return run_ranks(command, hosts, 1 if options.suite == "hosts" else _LOCAL_RANKS)[0]


def _as_rank(options: argparse.Namespace, device: torch.device) -> int:
    world_size, first = dist.get_world_size(), dist.get_rank() == 0
    cells = cells_of(options, memory_gib(device), world_size, device.type == "cpu")
    if not cells:
        raise SystemExit(f"--suite {options.suite}: no tables fit; allowed: smaller --num-ids, larger --max-gib")
    runs = options.runs or (1 if options.quick else 5)
    copy = copy_gb_s(device)
    rows: list[dict[str, Any]] = []
    report = {
        **about(),
        "suite": options.suite,
        "world_size": world_size,
        "backend": dist.get_backend(),
        "device": device_name(device),
        "threads_of_rank": torch.get_num_threads(),
        "copy_gb_s": round(copy, 2),
        "runs": runs,
        "steps": options.steps,
        "rows": rows,
    }
    if options.rate is not None:
        report["rate"] = options.rate
    for cell in cells:
        for row in measure(cell, runs, options.steps, copy, device):
            rows.append(row)
            if first:
                print(_line(row), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(report, indent=1) + "\n")
    dist.barrier()
    return int(any("wrong" in row for row in rows))


def _line(row: dict[str, Any]) -> str:
    hot = row["hot"] if isinstance(row["hot"], int) else "many"
    text = f"{row['variant']:17} m={row['m']:<5} hot={hot:<4} D={row['dim']:<4} {row['optimizer']:15}"
    if "wrong" in row:
        return f"{text} WRONG {row['wrong']}"
    step, spread = row["step"], ""
    if step["to_full"] is not None:
        spread = f"{step['to_full']:6.2f} of {row['full_is']} {step['to_full_spread']}"
    parts = " ".join(f"{phase} {row[phase]['p50_ms']:.2f}" for phase in ("forward", "backward", "eval"))
    return f"{text} {step['p50_ms']:9.2f} ms ({parts}) {step['gb_s']:7.2f} GB/s {spread}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; allowed: 1 and more")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value}; allowed: above 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{value}; allowed: 0 and more")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
