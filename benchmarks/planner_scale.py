"""How long planning takes as tables and ranks grow, in seconds of one core, and the memory of the largest.

    python -m benchmarks.planner_scale [--save]

Each size is planned in a process of its own, so that memory is of it alone.
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec import EmbeddingBagConfig
from torchrec.distributed.planner.types import ParameterConstraints

from benchmarks.machine import about
from benchmarks.planner_estimates import RESULTS
from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named

BY_TABLES = [(tables, 128) for tables in (1000, 2000, 4000)]
BY_RANKS = [(2000, ranks) for ranks in (128, 256, 512)]
LARGEST = (10_000, 1024)


def zipf(count: int) -> tuple[list[EmbeddingBagConfig], dict[str, ParameterConstraints]]:
    """Tables whose rows and pooling factors follow Zipf's law, independently; large ones mostly compressed."""
    generator = random.Random(0)
    sizes, poolings = list(range(count)), list(range(count))
    generator.shuffle(sizes)
    generator.shuffle(poolings)
    tables: list[EmbeddingBagConfig] = []
    constraints = {}
    for i in range(count):
        rows = max(50, int(4e7 / (1 + sizes[i]) ** 1.05))
        fields: dict[str, Any] = {"name": f"t{i}", "feature_names": [f"f{i}"], "num_embeddings": rows}
        if rows > 10_000 and i % 4:
            tables.append(
                CompositionalEmbeddingBagConfig(
                    **fields, embedding_dim=128, partitions=QuotientRemainder(num_collisions=4)
                )
            )
        else:
            tables.append(EmbeddingBagConfig(**fields, embedding_dim=128))
        constraints[f"t{i}"] = ParameterConstraints(pooling_factors=[max(1.0, 1000 / (1 + poolings[i]) ** 1.05)])
    return tables, constraints


def planned(tables: int, ranks: int) -> dict[str, float]:
    """Seconds of this process, GiB, and the balance of the plan."""
    configs, constraints = zipf(tables)
    module = CompositionalEmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    hardware = hardware_named("h100")
    planner = CompositionalEmbeddingShardingPlanner(
        hardware.topology(ranks, 8), 512, constraints=constraints, hardware=hardware
    )
    start = time.process_time()
    fused = {"optimizer": EmbOptimType.EXACT_ADAGRAD}
    estimated = planner.propose(module, [CompositionalEmbeddingBagCollectionSharder(fused)])
    plan: Any = estimated.sharding_plan().plan[""]
    seconds = time.process_time() - start
    if len(plan) != tables:
        raise RuntimeError(f"{len(plan)} of {tables} tables planned")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"cpu_seconds": seconds, "gib": memory, "balance": estimated.ranks.balance}


def in_a_process(tables: int, ranks: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.planner_scale", "--size", f"{tables}x{ranks}"]
    out: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return out


def growth(sizes: list[tuple[int, int]], of: dict[str, dict[str, float]], i: int) -> list[float]:
    """Seconds of a size over those of the one before, in units of n log n: 1 is as n log n, less is better."""
    seconds = [of[f"{t}x{r}"]["cpu_seconds"] for t, r in sizes]
    n_log_n = [size[i] * math.log(size[i]) for size in sizes]
    return [seconds[k + 1] / seconds[k] * n_log_n[k] / n_log_n[k + 1] for k in range(len(sizes) - 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the report to benchmarks/results")
    parser.add_argument("--size", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.size:
        tables, ranks = map(int, arguments.size.split("x"))
        print(json.dumps(planned(tables, ranks)))
        return 0
    of = {f"{t}x{r}": in_a_process(t, r) for t, r in dict.fromkeys([*BY_TABLES, *BY_RANKS, LARGEST])}
    report = {
        "machine": about(),
        "tables x ranks": of,
        "growth_by_tables": growth(BY_TABLES, of, 0),
        "growth_by_ranks": growth(BY_RANKS, of, 1),
    }
    print(json.dumps(report, indent=1))
    if arguments.save:
        path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}_planner_scale.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
