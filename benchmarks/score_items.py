"""Scores of all items from compositional tables against the dense product: ``python -m benchmarks.score_items``.

The dense product is ``u @ E.T`` of the S × D full rows, which a server without compositional tables has in memory. It
is also timed into memory that is given, and with ``torch.topk``. All take turns in one run, and each result is
compared with the dense one before anything is timed. One thread is timed by its processor time, which other work on the
machine lengthens less than the time that passes.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import about
from torchrec_qr import (
    ChineseRemainder,
    CompositionalEmbeddingCollection,
    CompositionalEmbeddingConfig,
    MixedRadix,
    QuotientRemainder,
)
from torchrec_qr.inference import materialize, score_all, top_items
from torchrec_qr.partitions import PartitionSpec

_SPECS: dict[str, PartitionSpec] = {
    "m=4": QuotientRemainder(num_collisions=4),
    "m=4, adjacent": QuotientRemainder(num_collisions=4, grouping="adjacent"),
    "m=√S": QuotientRemainder(balanced=True),
    "three digits": MixedRadix(balanced=True, num_partitions=3),
    "coprime": ChineseRemainder(balanced=True),
}
_OPERATIONS = ("add", "concat", "mult")


def main() -> None:
    """Prints, and writes, a row per operation and partitions, for each number of threads and users."""
    parser = argparse.ArgumentParser(prog="benchmarks.score_items", description=__doc__)
    parser.add_argument("--json", type=Path, help="writes the rows to this file")
    parser.add_argument("--items", type=int, default=1_000_000, help="S")
    parser.add_argument("--dim", type=int, default=64, help="D")
    parser.add_argument("--users", type=int, nargs="+", default=[64, 1], help="B")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for users in options.users:
            for operation in _OPERATIONS:
                own = measure(operation, options.items, options.dim, users, options.k, options.runs)
                rows += [{"threads": threads, **row} for row in own]
    for row in rows:
        figures = ", ".join(
            f"{label} {row[f'{what}_ms']:.1f} ms, {row[f'{what}_ratio']:.2f} {row[f'{what}_spread']} of dense"
            for what, label in (("all", "all scores"), ("into", "into given memory"), ("top", f"top {row['k']}"))
        )
        print(f"{row['threads']} threads, B={row['users']:<3} {row['operation']:7} {row['partitions']:14} {figures}")
    if options.json:
        options.json.write_text(json.dumps({**about(), "rows": rows}, indent=1) + "\n")


@torch.no_grad()
def measure(operation: str, items: int, dim: int, users: int, k: int, runs: int) -> list[dict[str, Any]]:
    """Returns a row for each of the partitions: medians, their ratios, and the least and largest ratio of a run."""
    torch.manual_seed(0)
    vectors, out = torch.randn(users, dim), torch.empty(users, items)
    collections = {name: _collection(spec, operation, items, dim) for name, spec in _SPECS.items()}
    full = None
    for name, collection in collections.items():
        full = materialize(collection, "t")
        _check(collection, vectors, vectors @ full.T, k, f"{operation}, {name}")
    assert full is not None
    functions: dict[str, Callable[[], object]] = {
        "dense": lambda: vectors @ full.T,
        "dense_into": lambda: torch.mm(vectors, full.T, out=out),
        "dense_top": lambda: (vectors @ full.T).topk(k),
    }
    for name, collection in collections.items():
        functions[f"into {name}"] = lambda own=collection: score_all(own, "t", vectors, out=out)  # type: ignore[misc]
        functions[f"all {name}"] = lambda own=collection: score_all(own, "t", vectors)  # type: ignore[misc]
        functions[f"top {name}"] = lambda own=collection: top_items(own, "t", vectors, k)  # type: ignore[misc]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for run in range(-1, runs):
        # Take turns in another order each time, because memory that one has freed is slower or faster for the next.
        random.Random(run).shuffle(order)
        for name in order:
            function = functions[name]
            start = clock()
            result = function()
            seconds = clock() - start
            del result
            if run >= 0:
                times[name].append(1e3 * seconds)
    rows = []
    for name, collection in collections.items():
        row: dict[str, Any] = {
            "users": users,
            "items": items,
            "dim": dim,
            "k": k,
            "operation": operation,
            "partitions": name,
        }
        row["clock"] = clock.__name__
        row |= {f"{of}_ms": round(statistics.median(times[of]), 2) for of in ("dense", "dense_into", "dense_top")}
        row["stored_mib"] = round(sum(p.nbytes for p in collection.parameters()) / 2**20, 2)
        for what, dense in (("all", "dense"), ("into", "dense_into"), ("top", "dense_top")):
            own = times[f"{what} {name}"]
            ratios = [a / b for a, b in zip(own, times[dense], strict=True)]
            row[f"{what}_ms"] = round(statistics.median(own), 2)
            row[f"{what}_ratio"] = round(statistics.median(own) / statistics.median(times[dense]), 2)
            row[f"{what}_spread"] = [round(min(ratios), 2), round(max(ratios), 2)]
        rows.append(row)
    return rows


def _collection(spec: PartitionSpec, operation: str, items: int, dim: int) -> CompositionalEmbeddingCollection:
    table = CompositionalEmbeddingConfig(
        name="t",
        feature_names=["item"],
        num_embeddings=items,
        embedding_dim=dim,
        partitions=spec,
        operation=operation,  # type: ignore[arg-type]
    )
    collection = CompositionalEmbeddingCollection(tables=[table])
    for weight in collection.parameters():
        weight.normal_()
    return collection


def _check(collection: CompositionalEmbeddingCollection, vectors: Tensor, dense: Tensor, k: int, label: str) -> None:
    """Raises AssertionError unless scores are those of the dense product, up to rounding."""
    scale = float(dense.abs().max())
    best = dense.topk(k).values
    for what, own, expected in (
        ("all scores", score_all(collection, "t", vectors), dense),
        ("top scores", top_items(collection, "t", vectors, k).scores, best),
    ):
        error = float((own - expected).abs().max()) / scale
        if not error < 1e-5:
            raise AssertionError(f"{label}: {what} differ from the dense product by {error:.1e} of the largest")


if __name__ == "__main__":
    main()
