"""Sharded collections from cases that are plain data, and so travel to any process; see `parity_reference`."""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import oracle
import torch
import torch.distributed as dist
from cases import Kind, kind_of, randomize
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from optimizer_reference import BETA1, BETA2
from pieces import Pieces, numpy_of, pieces_of
from ranks import device_of, own_device
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed import sharding_plan
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingCollection,
    CompositionalEmbeddingConfig,
    MixedRadix,
)
from torchrec_qr.distributed import (
    CompositionalEmbeddingBagCollectionSharder,
    CompositionalEmbeddingCollectionSharder,
    get_default_sharders,
)

LR, EPS = 0.05, 1e-8
# Columns of a shard where the planner splits columns.
PLANNED_WIDTH = 8
ROW_SPLIT = ("row_wise", "table_row_wise", "grid_shard")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": EmbOptimType.EXACT_SGD},
    "adagrad": {"optimizer": EmbOptimType.EXACT_ADAGRAD},
    "rowwise_adagrad": {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD},
    "adam": {"optimizer": EmbOptimType.ADAM, "beta1": BETA1, "beta2": BETA2},
    "amsgrad": {"optimizer": EmbOptimType.ADAM, "beta1": BETA1, "beta2": BETA2, "amsgrad": True},
}
# Those that FBGEMM lacks on a CPU: no plain tables beside.
NOT_PLAIN = ("adam", "amsgrad")


@dataclass(frozen=True)
class TableCase:
    """One table. ``kind`` "plain" is a TorchRec table, "tiny" has fewer base rows than there are ranks."""

    name: str
    kind: str
    sharding: str
    k: int = 2
    operation: str = "mult"
    pooling: str = "sum"
    features: tuple[str, ...] = ()
    dim: int = 16
    data_type: str = "FP32"
    out_of_range: str = "error"
    plan: str = "planner"
    hidden: int = 3

    @property
    def num_ids(self) -> int:
        return 9 if self.kind == "tiny" else 100

    @property
    def feature_names(self) -> list[str]:
        return list(self.features or (f"f_{self.name}",))

    def of_kind(self) -> Kind:
        if self.kind == "tiny":
            return Kind("tiny", MixedRadix(sizes=[3, 3]), 9, oracle.mixed_radix([3, 3]))
        return kind_of(self.kind, self.k)

    def config(self, pooled: bool) -> Any:
        fields: dict[str, Any] = {
            "name": self.name,
            "num_embeddings": self.num_ids,
            "embedding_dim": self.dim,
            "feature_names": self.feature_names,
            "data_type": DataType[self.data_type],
        }
        if pooled:
            fields["pooling"] = PoolingType[self.pooling.upper()]
        if self.kind == "plain":
            return EmbeddingBagConfig(**fields) if pooled else EmbeddingConfig(**fields)
        fields |= {
            "partitions": self.of_kind().partitions,
            "operation": self.operation,
            "out_of_range": self.out_of_range,
            "path_hidden": self.hidden if self.operation == "path" else None,
            "path_activation": "tanh" if self.operation == "path" else "relu",
        }
        if self.operation == "concat" and self.k == 3 and self.dim == 16:
            fields["partition_dims"] = (8, 4, 4)
        return CompositionalEmbeddingBagConfig(**fields) if pooled else CompositionalEmbeddingConfig(**fields)


@dataclass(frozen=True)
class Run:
    """One collection of many tables, trained for a few steps. The global batch does not depend on the world size."""

    tables: tuple[TableCase, ...]
    optimizer: str = "sgd"
    weighted: bool = False
    pooled: bool = True
    steps: int = 3
    bags: int = 8
    int32: bool = False
    index_dedup: bool = False
    wild_ids: bool = False

    def configs(self) -> list[Any]:
        return [t.config(self.pooled) for t in self.tables]

    def collection(self, device: str = "cpu") -> nn.Module:
        if self.pooled:
            return CompositionalEmbeddingBagCollection(self.configs(), self.weighted, torch.device(device))
        return CompositionalEmbeddingCollection(self.configs(), torch.device(device))

    def initial(self) -> nn.Module:
        """The unsharded module with the initial values of the run."""
        collection = self.collection()
        randomize(collection, 7)
        return collection

    def outputs(self) -> list[tuple[str, TableCase, str]]:
        """Per output, in order: its name, its table and its feature."""
        names = get_embedding_names_by_table(self.configs())
        return [
            (name, table, feature)
            for table, of_table in zip(self.tables, names, strict=True)
            for name, feature in zip(of_table, table.feature_names, strict=True)
        ]


@dataclass
class Batch:
    """Bags of ids and their weights, per feature."""

    ids: dict[str, list[list[int]]] = field(default_factory=dict)
    weights: dict[str, list[list[float]]] = field(default_factory=dict)

    def part(self, rank: int, world_size: int) -> "Batch":
        """The bags of one rank."""

        def cut(bags: list[Any]) -> list[Any]:
            size = len(bags) // world_size
            return bags[rank * size : (rank + 1) * size]

        return Batch({f: cut(b) for f, b in self.ids.items()}, {f: cut(b) for f, b in self.weights.items()})

    def kjt(self, weighted: bool, int32: bool = False) -> KeyedJaggedTensor:
        ids = [x for bags in self.ids.values() for bag in bags for x in bag]
        weights = [w for bags in self.weights.values() for bag in bags for w in bag]
        dtype = torch.int32 if int32 else torch.int64
        return KeyedJaggedTensor(
            keys=list(self.ids),
            values=torch.tensor(ids, dtype=dtype),
            lengths=torch.tensor([len(bag) for bags in self.ids.values() for bag in bags], dtype=dtype),
            weights=torch.tensor(weights) if weighted else None,
        )


def global_batch(run: Run, step: int) -> Batch:
    """Jagged, with empty bags, and of few ids, so that rows stay untouched; on step 1 only the first bags have ids.

    On step 2 the first feature has no ids on any rank. ``wild_ids``: outside of [0, S), too, where
    the table takes them.
    """
    rng = random.Random(f"batch {step}")
    sizes = {f: t.num_ids for t in reversed(run.tables) for f in t.feature_names}
    policies = {f: t.out_of_range for t in reversed(run.tables) for f in t.feature_names}
    batch = Batch()
    for i, feature in enumerate(reversed(list(sizes))):  # in another order than the tables'
        pool = rng.sample(range(sizes[feature]), min(12, sizes[feature] - 2))
        if run.wild_ids and policies[feature] in ("clamp", "wrap"):
            pool += [sizes[feature], -1, 3 * sizes[feature] + 5]
        bags = [rng.choices(pool, k=rng.choice([0, 1, 2, 3, 5])) for _ in range(run.bags)]
        if step == 1:
            bags = [bag if b < run.bags // 4 else [] for b, bag in enumerate(bags)]
        if step == 2 and i == 0:
            bags = [[] for _ in bags]
        batch.ids[feature] = bags
        # Multiples of 1/64: exact in every storage type.
        batch.weights[feature] = [[rng.randrange(32, 128) / 64 for _ in bag] for bag in bags]
    return batch


class Model(nn.Module):
    """The collection, its outputs end to end in one tensor: replicated parameters need a root that returns tensors."""

    def __init__(self, collection: nn.Module, names: list[str], pooled: bool) -> None:
        super().__init__()
        self.collection = collection
        self._names, self._pooled = names, pooled

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        out = self.collection(features)
        if self._pooled:
            return KeyedTensor.regroup([out], [self._names])[0]
        return torch.cat([out[name].values().reshape(-1) for name in self._names])


def loss_of(out: Tensor, world_size: int) -> Tensor:
    """Averaged over ranks, as DMP does: 0.1 Σ out² over all ranks."""
    return 0.1 * world_size * (out.float() ** 2).sum()


def hand_plan(
    module: nn.Module, tables: list[TableCase], sharder: Any, column_width: int = 4
) -> EmbeddingModuleShardingPlan:
    """A plan of TorchRec's own helpers; tables are dealt to ranks and hosts in turn, columns unevenly."""
    world_size = dist.get_world_size()
    local_size = min(2, world_size) if world_size == 4 else world_size
    plan = EmbeddingModuleShardingPlan()
    parameters = sharder.shardable_parameters(module)
    for i, table in enumerate(tables):
        host = i % (world_size // local_size)
        # Several shards on one rank, not in the order of the columns.
        several = [(i + c) % world_size for c in (1, 0, 1, 1)][: table.dim // column_width]
        on_host = [host * local_size + c % local_size for c in range(2)]
        make = {
            "table_wise": sharding_plan.table_wise(rank=i % world_size, compute_kernel="fused"),
            "column_wise": sharding_plan.column_wise(ranks=several, compute_kernel="fused"),
            "table_column_wise": sharding_plan.column_wise(ranks=on_host, compute_kernel="fused"),
            "row_wise": sharding_plan.row_wise(compute_kernel="fused"),
            "table_row_wise": sharding_plan.table_row_wise(host_index=host),
            "grid_shard": _grid,
            "data_parallel": sharding_plan.data_parallel(),
        }[table.sharding]
        sharding = make(parameters[table.name], local_size, world_size, own_device().type, sharder)
        kernel = "dense" if table.sharding == "data_parallel" else "fused"
        plan[table.name] = dataclasses.replace(sharding, sharding_type=table.sharding, compute_kernel=kernel)
    return plan


def _grid(p: Tensor, local_size: int, world_size: int, *_: Any) -> ParameterSharding:
    """A block of columns per host, the last host first; TorchRec's helper makes one block of fewer than 128 columns."""
    hosts = world_size // local_size
    rows, columns = -(-p.shape[0] // local_size), p.shape[1] // hosts
    shards = []
    for block in range(hosts):
        for i in range(local_size):
            first = min(i * rows, p.shape[0])
            size = [min(rows, p.shape[0] - first), columns]
            rank = (hosts - 1 - block) * local_size + i
            shards.append(ShardMetadata([first, block * columns], size, f"rank:{rank}/{device_of(rank)}"))
    ranks = [rank for block in range(hosts)[::-1] for rank in range(block * local_size, (block + 1) * local_size)]
    return ParameterSharding("grid_shard", "fused", ranks, EnumerableShardingSpec(shards))


def sharders_of(run: Run, fused_params: dict[str, Any] | None = None) -> list[Any]:
    """TorchRec's default sharders and ours, ours with the run's fused optimizer."""
    if fused_params is None:
        fused_params = {**OPTIMIZERS[run.optimizer], "learning_rate": LR, "eps": EPS}
    return [
        CompositionalEmbeddingBagCollectionSharder(fused_params=fused_params),
        CompositionalEmbeddingCollectionSharder(fused_params=fused_params, use_index_dedup=run.index_dedup),
    ] + [s for s in get_default_sharders() if not type(s).__name__.startswith("Compositional")]


def plan_of(run: Run, model: Model, sharders: list[Any]) -> ShardingPlan:
    """The planner's plan under constraints, with hand-written entries for the tables that ask for them."""
    world_size = dist.get_world_size()
    local_size = 2 if world_size == 4 else world_size
    constraints = {
        t.name: ParameterConstraints(sharding_types=[t.sharding], min_partition=PLANNED_WIDTH) for t in run.tables
    }
    topology = Topology(world_size=world_size, local_world_size=local_size, compute_device=own_device().type)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharder = sharders[0 if run.pooled else 1]
    by_hand = [t for t in run.tables if t.plan == "hand"]
    module_plan = plan.plan["collection"]
    assert isinstance(module_plan, EmbeddingModuleShardingPlan)
    # Column shards of sequences are all of one width, in TorchRec: those by hand as wide as the planner's.
    width = 4 if run.pooled else PLANNED_WIDTH
    module_plan.update(hand_plan(model.collection, by_hand, sharder, width))
    assert {name: s.sharding_type for name, s in module_plan.items()} == {t.name: t.sharding for t in run.tables}
    return plan


def plan_by_hand(run: Run, model: Model, sharders: list[Any], kernel: str | None = None) -> ShardingPlan:
    """A plan without the planner; ``kernel`` in place of the usual compute kernels."""
    plan = hand_plan(model.collection, list(run.tables), sharders[0 if run.pooled else 1])
    for sharding in plan.values():
        sharding.compute_kernel = kernel or sharding.compute_kernel
    return ShardingPlan({"collection": plan})


def shard(
    run: Run,
    sharders: list[Any] | None = None,
    collection: nn.Module | None = None,
    plan_of: Callable[[Run, Model, list[Any]], ShardingPlan] = plan_of,
    model_type: type[Model] = Model,
) -> DistributedModelParallel:
    """The run's model, built on the meta device and sharded, with the initial values of the run."""
    names = [name for name, _, _ in run.outputs()]
    model = model_type(run.collection("meta") if collection is None else collection, names, run.pooled)
    sharders = sharders or sharders_of(run)
    plan = plan_of(run, model, sharders)
    dmp = DistributedModelParallel(model, device=own_device(), plan=plan, sharders=sharders)
    dmp.load_state_dict({f"collection.{k}": v for k, v in run.initial().state_dict().items()})
    return dmp


@dataclass
class Trained:
    """What a rank has at the end: its outputs per step, its pieces of the states, and the plan's column cuts."""

    outputs: list[Any]
    state: dict[str, Pieces]
    optimizer_state: dict[str, Pieces]
    columns: dict[str, list[tuple[int, int]]]


def train(rank: int, world_size: int, run: Run, fused_params: dict[str, Any] | None = None) -> Trained:
    """Runs on a rank."""
    return trained(rank, world_size, run, shard(run, sharders_of(run, fused_params)))


def trained(
    rank: int, world_size: int, run: Run, dmp: DistributedModelParallel, after: Callable[[int], None] = lambda _: None
) -> Trained:
    """Trains a sharded model, with a call at the end of every step."""
    outputs = []
    for step in range(run.steps):
        dmp.fused_optimizer.zero_grad()
        out = dmp(global_batch(run, step).part(rank, world_size).kjt(run.weighted, run.int32).to(own_device()))
        outputs.append(numpy_of(out))
        loss_of(out, world_size).backward()
        dmp.fused_optimizer.step()
        after(step)
    return Trained(outputs, weights_of(dmp), optimizer_state_of(dmp), columns_of(dmp))


def weights_of(dmp: DistributedModelParallel) -> dict[str, Pieces]:
    return {k: pieces_of(v) for k, v in dmp.state_dict().items() if not k.endswith("fingerprint")}


def optimizer_state_of(dmp: DistributedModelParallel) -> dict[str, Pieces]:
    state = dmp.fused_optimizer.state_dict()["state"]
    return {f"{k} {name}": pieces_of(v) for k, of in state.items() for name, v in of.items()}


def columns_of(dmp: DistributedModelParallel) -> dict[str, list[tuple[int, int]]]:
    """Per table, the blocks of logical columns that its plan makes."""
    module_plan = dmp.plan.plan["collection"]
    assert isinstance(module_plan, EmbeddingModuleShardingPlan)
    out = {}
    for name, sharding in module_plan.items():
        shards = getattr(sharding.sharding_spec, "shards", None)
        if shards is not None:
            blocks = {(s.shard_offsets[1], s.shard_offsets[1] + s.shard_sizes[1]) for s in shards}
            out[name] = sorted(blocks)
    return out
