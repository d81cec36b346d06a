"""Whether a plan's estimated step is its measured one: plans drawn by a seed, estimated, run, and compared.

    python -m benchmarks.planner_estimates                 # two ranks over loopback
    python -m benchmarks.planner_estimates --link 1gbit    # two network namespaces, as root
    python -m benchmarks.planner_estimates --calibrate     # this host's constants, for torchrec_qr/planner/hardware.py

Plans take turns, round after round, so that a busy machine is as slow for each; medians are compared.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingPlan

from benchmarks.bridged_hosts import bridged_hosts
from benchmarks.calibration import link_constants, lookup_constants
from benchmarks.local_ranks import THIS_HOST, run_ranks
from benchmarks.machine import about
from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, Hardware, hardware_named

RESULTS = Path(__file__).parent / "results"
WORLD_SIZE = 2
BATCH_SIZE = 2048
DIM = 64
TABLES = 12
NUM_PLANS = 14
ROUNDS = 9
STEPS = 3  # of a plan, one after the other
SEED = 0

_OF_LOOKUPS = "TORCHREC_QR_CONSTANTS"
# glibc returns what a step has freed to the system, or not, as its heap happens to lie; up to 9,000 page faults a step,
# a third of its time, then are of the process and not of the plan. So it is to keep what it has.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}


class Model(nn.Module):
    """The collection alone, as a loss: what a plan can change."""

    def __init__(self, collection: nn.Module, features: list[str]) -> None:
        super().__init__()
        self.ebc = collection
        self._features = features
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        return KeyedTensor.regroup([self.ebc(batch)], [self._features])[0].mean() * self.scale


def tables() -> tuple[list[EmbeddingBagConfig], dict[str, ParameterConstraints]]:
    """Large and small tables, few and many collisions, one-hot and multi-hot."""
    generator = random.Random(SEED)
    configs: list[EmbeddingBagConfig] = []
    constraints = {}
    for i in range(TABLES):
        rows = generator.choice([2_000, 20_000, 200_000])
        collisions = generator.choice([4, 64, max(4, round(rows**0.5))])
        name = f"t{i}"
        configs.append(
            CompositionalEmbeddingBagConfig(
                name=name,
                feature_names=[f"f{i}"],
                num_embeddings=rows,
                embedding_dim=DIM,
                partitions=QuotientRemainder(num_collisions=collisions),
            )
        )
        constraints[name] = ParameterConstraints(pooling_factors=[float(generator.choice([1, 1, 4, 10]))])
    return configs, constraints


def sharders() -> list[Any]:
    return [CompositionalEmbeddingBagCollectionSharder({"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.01})]


def collection() -> CompositionalEmbeddingBagCollection:
    return CompositionalEmbeddingBagCollection(tables=tables()[0], device=torch.device("meta"))


def planner_of(hardware: Hardware, hosts: int, **arguments: Any) -> CompositionalEmbeddingShardingPlanner:
    topology = hardware.topology(WORLD_SIZE, WORLD_SIZE // hosts, memory_gib=8)
    constraints = arguments.pop("constraints", tables()[1])
    return CompositionalEmbeddingShardingPlanner(
        topology, BATCH_SIZE, hardware=hardware, constraints=constraints, **arguments
    )


def plans(hardware: Hardware, hosts: int) -> dict[str, ShardingPlan]:
    """The planner's own, TorchRec's for the same model, and plans drawn by a seed."""
    ebc, of_tables = collection(), tables()[1]
    chosen = planner_of(hardware, hosts).plan(ebc, sharders())
    stock = EmbeddingShardingPlanner(
        topology=hardware.topology(WORLD_SIZE, WORLD_SIZE // hosts, memory_gib=8),
        batch_size=BATCH_SIZE,
        constraints=of_tables,
        storage_reservation=FixedPercentageStorageReservation(0.15),
    ).plan(ebc, sharders())
    found = {"chosen": chosen, "torchrec": stock}
    generator = random.Random(SEED)
    kinds = ["table_wise", "column_wise", "row_wise", "data_parallel"]
    for i in range(NUM_PLANS - 2):
        # Some of one kind for all tables, some mixed; ranks drawn too, so that not all are balanced.
        mixed = generator.sample(kinds, 1 + i % 4)
        drawn = {
            name: ParameterConstraints(
                pooling_factors=c.pooling_factors, sharding_types=[generator.choice(mixed)], min_partition=32
            )
            for name, c in of_tables.items()
        }
        bound = {
            name: [generator.randrange(WORLD_SIZE)]
            for name, c in drawn.items()
            if c.sharding_types[0] == "table_wise" and i % 3 == 2  # type: ignore[index]
        }
        found[f"drawn {i}: {'+'.join(sorted(mixed))}{', bound' if bound else ''}"] = planner_of(
            hardware, hosts, constraints=drawn, ranks=bound
        ).plan(ebc, sharders())
    return found


def batch(seed: int) -> KeyedJaggedTensor:
    configs, constraints = tables()
    generator = torch.Generator().manual_seed(seed)
    values, lengths = [], []
    for config in configs:
        per_bag = round(constraints[config.name].pooling_factors[0])
        values.append(torch.randint(0, config.num_embeddings, (BATCH_SIZE * per_bag,), generator=generator))
        lengths.append(torch.full((BATCH_SIZE,), per_bag))
    return KeyedJaggedTensor(
        keys=[f for c in configs for f in c.feature_names], values=torch.cat(values), lengths=torch.cat(lengths)
    )


def measure(found: dict[str, ShardingPlan], rounds: int) -> dict[str, float]:
    """Median milliseconds of a step on the slowest rank, plans taking turns."""
    features = [f for c in tables()[0] for f in c.feature_names]
    models = {}
    for name, plan in found.items():
        moved = ShardingPlan({"ebc": plan.plan[""]})
        model = DistributedModelParallel(
            Model(collection(), features), device=torch.device("cpu"), plan=moved, sharders=sharders()
        )
        models[name] = model
    batches = [batch(100 * dist.get_rank() + i) for i in range(STEPS)]
    times: dict[str, list[float]] = {name: [] for name in found}
    order, generator = list(models), random.Random(SEED)
    for turn in range(rounds + 1):
        # A plan is not always measured after the same other one, nor in its first step after that.
        generator.shuffle(order)
        for name in order:
            for i in range(STEPS + 1):
                dist.barrier()
                start = time.perf_counter()
                models[name](batches[i % STEPS]).backward()
                spent = torch.tensor([(time.perf_counter() - start) * 1e3])
                dist.all_reduce(spent, op=dist.ReduceOp.MAX)
                if turn and i:
                    times[name].append(float(spent))
    return {name: statistics.median(of_plan) for name, of_plan in times.items()}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks."""

    def ranks(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values).argsort().argsort().double()

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def calibrated(hosts: int, rounds: int = 9, of_lookups: str | None = None) -> Hardware:
    """This host's constants, measured on the ranks that call it together.

    Args:
        of_lookups: those measured over loopback, as JSON: on a slow link communication hides the lookup.
    """
    base = hardware_named("cpu") if of_lookups is None else Hardware(**json.loads(of_lookups))
    link = link_constants(rounds, base)
    if of_lookups is None:
        constants = {**asdict(base), **lookup_constants(rounds, link["link_gb_s"])}
        base = Hardware(**{**constants, "source": "this host"})
        # Anew, with what a shard and a replica take here.
        link = link_constants(rounds, base)
    measured: dict[str, Any] = dict(link)
    measured["inter_gb_s" if hosts > 1 else "intra_gb_s"] = measured.pop("link_gb_s")
    return replace(base, **measured)


def run_rank(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    hosts = 2 if arguments.link == "1gbit" else 1
    hardware = calibrated(hosts, of_lookups=os.environ.get(_OF_LOOKUPS))
    if arguments.calibrate:
        if rank == 0:
            print(json.dumps(asdict(hardware), indent=1))
        dist.barrier()
        dist.destroy_process_group()
        return
    # All ranks must run the plans of rank 0, whose constants decide.
    box: list[Any] = [plans(hardware, hosts) if rank == 0 else None]
    dist.broadcast_object_list(box)
    found = box[0]
    measured = measure(found, arguments.rounds)
    if rank == 0:
        made = planner_of(hardware, hosts)
        estimated = {name: made.step_ms(plan, collection(), sharders()) for name, plan in found.items()}
        drawn = [name for name in found if name.startswith("drawn")]
        best = min(measured.values())
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "link": arguments.link,
            "machine": about(),
            "hardware": {k: v for k, v in asdict(hardware).items() if k != "source"},
            "plans": {n: {"estimated_ms": estimated[n], "measured_ms": measured[n]} for n in found},
            "spearman": spearman([estimated[n] for n in drawn], [measured[n] for n in drawn]),
            "spearman_all": spearman(list(estimated.values()), [measured[n] for n in estimated]),
            "chosen_over_best": measured["chosen"] / best,
            "chosen_over_torchrec": measured["chosen"] / measured["torchrec"],
        }
        print(json.dumps(report, indent=1))
        if arguments.save:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}_planner_{arguments.link}.json"
            path.write_text(json.dumps(report, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def launch(arguments: argparse.Namespace) -> int:
    """Starts the ranks, and waits for them."""
    command = [sys.executable, "-m", "benchmarks.planner_estimates", "--rank"]
    if arguments.link == "loopback":
        return run_ranks([*command, *sys.argv[1:]], [THIS_HOST], WORLD_SIZE, _ALLOCATOR)[0]
    code, constants = run_ranks([*command, "--calibrate"], [THIS_HOST], WORLD_SIZE, _ALLOCATOR, capture=True)
    if code:
        return code
    with bridged_hosts(2) as hosts:
        return run_ranks([*command, *sys.argv[1:]], hosts, 1, {**_ALLOCATOR, _OF_LOOKUPS: constants})[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", choices=["loopback", "1gbit"], default="loopback")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--save", action="store_true", help="write the report to benchmarks/results")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(arguments)
        return 0
    return launch(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
