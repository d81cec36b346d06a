"""Step times: uncompressed tables, TorchRec's stock parts, dlrm's QR bag, and ours: ``python -m benchmarks.step``.

Two gloo processes of one thread each train tables on random ids: forward, backward and optimizer. All variants of a
cell are timed in turn in one run, so that a ratio to ``full`` holds on a busy machine; a run gives a median, and the
figures are medians of the runs' medians, with the least and the largest ratio. Before and after, a step of every
variant is compared with float64. ``--hosts 2``: each process is in a network namespace of its own, on a link of
``--rate``.
"""

import argparse
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.machine import about
from benchmarks.two_hosts import Host, two_hosts

WORLD_SIZE = 2
DIMS, SIZES = [16, 64, 128], [200_000, 10_000_000]
SHARDINGS = ["table_wise", "column_wise", "data_parallel"]
ALL = ["full", "stock_pooled", "stock_unpooled", "dlrm_bag", "fused_alone", "fused", "fallback"]


def main() -> None:
    """Measures the grid, or ``--quick`` a part of it, and prints a line per row."""
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__)
    parser.add_argument("--json", type=Path, help="writes the rows to this file")
    parser.add_argument("--quick", action="store_true", help="full and fused, table-wise, D=64, S=2e5, SGD; a minute")
    parser.add_argument("--headline", action="store_true", help="all variants, table-wise, D=64, S=2e5")
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1, help="2 needs root and iproute2")
    parser.add_argument("--rate", default="1gbit", help="of the link between two hosts, as tc takes it")
    parser.add_argument("--runs", type=int, help="default: 5, --quick: 1")
    parser.add_argument("--steps", type=int, default=11, help="timed steps per run and variant")
    parser.add_argument("--bags", type=int, default=2048, help="local batch")
    parser.add_argument("--variants", nargs="+", choices=ALL, help="of those of each cell; default: all")
    parser.add_argument("--dims", nargs="+", type=int, choices=DIMS, default=DIMS, help="of the grid")
    parser.add_argument("--num-ids", nargs="+", type=int, choices=SIZES, default=SIZES, help="of the grid")
    parser.add_argument("--shardings", nargs="+", choices=SHARDINGS, default=SHARDINGS, help="of the grid")
    parser.add_argument("--max-gib", type=float, default=6.0, help="leaves out cells whose full tables are larger")
    options = parser.parse_args()
    cells = cells_of(options)
    if options.variants:
        cells = [{**c, "variants": [v for v in c["variants"] if v in options.variants]} for c in cells]
    runs = options.runs or (1 if options.quick else 5)
    rows: list[dict[str, Any]] = []
    try:
        with two_hosts(options.rate) if options.hosts == 2 else nullcontext([Host([], {})]) as hosts:
            run(cells, {"bags": options.bags, "runs": runs, "steps": options.steps}, hosts, rows)
    finally:
        # Of all cells that ended, also where a later one was too large for this machine, or was interrupted.
        if options.json and rows:
            sizes = {"runs": runs, "bags": options.bags, "hosts": options.hosts}
            if options.hosts == 2:
                sizes["rate"] = options.rate
            options.json.write_text(json.dumps({**about(), **sizes, "rows": rows}, indent=1) + "\n")


def cells_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.quick:
        return quick()
    if options.headline:
        return headline()
    return between_hosts() if options.hosts == 2 else grid(options)


def cell(num_ids: int, dim: int, features: int, sharding: str, optimizer: str, **fields: Any) -> dict[str, Any]:
    tables = {"num_ids": num_ids, "dim": dim, "num_features": features, "sharding": sharding, "optimizer": optimizer}
    return {"tables": tables, "ms": [4, math.isqrt(num_ids)], "hots": [1, 10], "variants": ALL, **fields}


def quick() -> list[dict[str, Any]]:
    return [cell(200_000, 64, 26, "table_wise", "sgd", variants=["full", "fused"])]


def headline() -> list[dict[str, Any]]:
    return [cell(200_000, 64, 26, "table_wise", o, variants=_of(o)) for o in ("sgd", "rowwise_adagrad")]


def grid(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All shardings, optimizers and widths asked for, with as many features of the largest tables as fit."""
    cells = []
    for dim, num_ids in itertools.product(options.dims, options.num_ids):
        fitting = int(options.max_gib * 2**30 / (num_ids * dim * 4))
        features = 26 if num_ids == 200_000 else min(4, fitting // 2 * 2)
        if features and features <= fitting:
            cells += [
                cell(num_ids, dim, features, sharding, optimizer, variants=["full", "fused"])
                for sharding in options.shardings
                for optimizer in ("sgd", "rowwise_adagrad")
            ]
    return cells


def _of(optimizer: str) -> list[str]:
    # torch has no rowwise Adagrad for sparse gradients.
    return [v for v in ALL if v != "dlrm_bag" or optimizer == "sgd"]


def between_hosts() -> list[dict[str, Any]]:
    """Table-wise, and data-parallel against full tables table-wise: where bytes decide."""
    cells = []
    for optimizer in ("sgd", "rowwise_adagrad"):
        cells.append(cell(200_000, 64, 26, "table_wise", optimizer, variants=["full", "fused"]))
        # With 4 ids a row the gradients alone are 333 MB.
        few_rows = [math.isqrt(200_000)]
        cells.append(cell(200_000, 64, 26, "data_parallel", optimizer, ms=few_rows, variants=["full", "fused"]))
    return cells


def run(cells: list[dict[str, Any]], arguments: dict[str, Any], hosts: list[Host], rows: list[dict[str, Any]]) -> None:
    """Runs the cells on processes of their own, and adds the rows as they are printed."""
    local_size = WORLD_SIZE // len(hosts)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows"
        out.touch()
        job = json.dumps({"cells": cells, "arguments": arguments, "out": str(out), "store": f"{folder}/store"})
        ranks = [
            subprocess.Popen(
                [*hosts[rank // local_size].prefix, sys.executable, "-m", "benchmarks.step_worker", job],
                env={
                    **os.environ,
                    **hosts[rank // local_size].environment,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(WORLD_SIZE),
                    "LOCAL_RANK": str(rank % local_size),
                    "LOCAL_WORLD_SIZE": str(local_size),
                    "OMP_NUM_THREADS": "1",
                },
                stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
            )
            for rank in range(WORLD_SIZE)
        ]
        try:
            _follow(out, ranks, rows)
        finally:
            for rank in ranks:
                rank.kill()


def _follow(out: Path, ranks: list[subprocess.Popen[bytes]], rows: list[dict[str, Any]]) -> None:
    while True:
        ended = [rank.poll() for rank in ranks]
        lines = out.read_text().splitlines()
        for line in lines[len(rows) :]:
            rows.append(json.loads(line))
            print(_line(rows[-1]), flush=True)
        if all(code == 0 for code in ended):
            return
        if any(code not in (None, 0) for code in ended):
            raise SystemExit(f"a rank failed (exit codes {ended}); VERBOSE=1 shows what it said")
        try:
            ranks[0].wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue


def _line(row: dict[str, Any]) -> str:
    ratio = "" if row["ratio_to_full"] is None else f"{row['ratio_to_full']:6.2f} of full {row['ratio_spread']}"
    return (
        f"{row['variant']:15} {row['sharding']:14} m={row['m']:<5} hot={row['hot']:<3} D={row['dim']:<4} "
        f"S={row['num_ids']:<9} {row['optimizer']:16} {row['median_ms']:8.1f} ms, CPU {row['median_cpu_ms']:8.1f} "
        f"{ratio}"
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
