"""Sharded collections from cases that are plain data, and so travel to any process; see `parity_reference`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracle
import torch
import torch.distributed as dist
from cases import Kind, kind_of, randomize
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from global_batches import BAGS, Batch, global_batch
from optimizer_reference import BETA1, BETA2
from pieces import Pieces, numpy_of
from placements import SHARDINGS, placement, plan_of
from ranks import own_device
from sharded_model import EPS, LR, Model, distributed, own_state, own_weights, sharders_of, steps_of
from single_tables import collection_of, plain_table, table_of
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import EmbeddingModuleShardingPlan
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_qr import MixedRadix

# Columns of a shard where the planner splits columns.
PLANNED_WIDTH = 8
ROW_SPLIT = ("row_wise", "table_row_wise", "grid_shard")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": EmbOptimType.EXACT_SGD},
    "adagrad": {"optimizer": EmbOptimType.EXACT_ADAGRAD},
    "rowwise_adagrad": {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD},
    "adam": {"optimizer": EmbOptimType.ADAM, "beta1": BETA1, "beta2": BETA2},
    "amsgrad": {"optimizer": EmbOptimType.ADAM, "beta1": BETA1, "beta2": BETA2, "amsgrad": True},
    "partial_rowwise_adam": {"optimizer": EmbOptimType.PARTIAL_ROWWISE_ADAM, "beta1": BETA1, "beta2": BETA2},
    "lamb": {"optimizer": EmbOptimType.LAMB, "beta1": BETA1, "beta2": BETA2},
    "partial_rowwise_lamb": {"optimizer": EmbOptimType.PARTIAL_ROWWISE_LAMB, "beta1": BETA1, "beta2": BETA2},
}
MODES = {"l2": WeightDecayMode.L2, "decoupled": WeightDecayMode.DECOUPLE}
# Those that FBGEMM lacks on a CPU: no plain tables beside.
NOT_PLAIN = ("adam", "amsgrad", "partial_rowwise_adam", "lamb", "partial_rowwise_lamb")
# Optimizers of dense kernels, each with the fused one that has its rule.
DENSE = {"dense_sgd": "sgd", "dense_adagrad": "adagrad"}
# Its state is of the type of the table, and 1e-8 is zero in fp16.
DENSE_EPS = 1e-3


@dataclass(frozen=True)
class TableCase:
    """One table. ``kind`` "plain" is a TorchRec table, "tiny" has fewer base rows than there are ranks, and "open" has
    2^40 ids."""

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
    hash_seed: int | None = None

    @property
    def num_ids(self) -> int:
        return {"tiny": 9, "open": 2**40}.get(self.kind, 100)

    @property
    def feature_names(self) -> list[str]:
        return list(self.features or (f"f_{self.name}",))

    def of_kind(self) -> Kind:
        sizes = {"tiny": [3, 3], "open": [2**16, 2**12, 2**12]}.get(self.kind)
        if sizes is None:
            kind = kind_of(self.kind, self.k)
        else:
            kind = Kind(self.kind, MixedRadix(sizes=sizes), self.num_ids, oracle.mixed_radix(sizes))
        return kind if self.hash_seed is None else kind.hashed(self.hash_seed)

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
            return plain_table(pooled, **fields)
        fields |= {
            "operation": self.operation,
            "out_of_range": self.out_of_range,
            "path_hidden": self.hidden if self.operation == "path" else None,
            "path_activation": "tanh" if self.operation == "path" else "relu",
        }
        if self.hash_seed is not None:
            fields |= {"id_hash": "splitmix64", "hash_seed": self.hash_seed}
        if self.operation == "concat" and self.k == 3 and self.dim == 16:
            fields["partition_dims"] = (8, 4, 4)
        return table_of(self.of_kind().partitions, pooled, **fields)


def one_of_each(shardings: tuple[str, ...] = SHARDINGS, **fields: Any) -> tuple[TableCase, ...]:
    """A table for each sharding type, which gives it its name."""
    return tuple(TableCase(name=s, sharding=s, **{"kind": "strided", **fields}) for s in shardings)


@dataclass(frozen=True)
class Run:
    """One collection of many tables, trained for a few steps. The global batch does not depend on the world size."""

    tables: tuple[TableCase, ...]
    optimizer: str = "sgd"
    weighted: bool = False
    pooled: bool = True
    steps: int = 3
    bags: int = BAGS
    int32: bool = False
    index_dedup: bool = False
    wild_ids: bool = False
    weight_decay: float = 0.0
    mode: str = "l2"

    def configs(self) -> list[Any]:
        return [t.config(self.pooled) for t in self.tables]

    def collection(self, device: str = "cpu") -> nn.Module:
        collection: nn.Module = collection_of(self.configs(), device, self.weighted)
        return collection

    def initial(self) -> nn.Module:
        """The unsharded module with the initial values of the run."""
        collection = self.collection()
        randomize(collection, 7)
        return collection

    def batch(self, step: int) -> Batch:
        """The batch of all ranks."""
        return global_batch(self.configs(), step, self.bags, self.wild_ids, 32 if self.int32 else 64)

    def own_batch(self, step: int) -> KeyedJaggedTensor:
        """This rank's part of it, on its device."""
        own = self.batch(step).part(dist.get_rank(), dist.get_world_size())
        return own.kjt(self.weighted, self.int32).to(own_device())

    def sharders(self, fused_params: dict[str, Any] | None = None, codecs: dict[str, Any] | None = None) -> list[Any]:
        """Sharders with the run's fused optimizer, which a dense one replaces, or with another."""
        if fused_params is None:
            own = {} if self.optimizer in DENSE else OPTIMIZERS[self.optimizer]
            fused_params = own and {**own, "learning_rate": LR, "eps": EPS}
            if self.weight_decay:
                fused_params |= {"weight_decay": self.weight_decay, "weight_decay_mode": MODES[self.mode]}
        return sharders_of(fused_params, codecs, self.index_dedup)

    def sharder(self, sharders: list[Any]) -> Any:
        """The one of the run's collection."""
        return sharders[0 if self.pooled else 1]

    def outputs(self) -> list[tuple[str, TableCase, str]]:
        """Per output, in order: its name, its table and its feature."""
        names = get_embedding_names_by_table(self.configs())
        return [
            (name, table, feature)
            for table, of_table in zip(self.tables, names, strict=True)
            for name, feature in zip(of_table, table.feature_names, strict=True)
        ]


def parts_of(run: Run, batch: Batch, out: Tensor) -> dict[str, Tensor]:
    """Returns the outputs, by name, that `Model` or the reference lays end to end."""
    sizes = [t.dim * (1 if run.pooled else sum(map(len, batch.ids[feature]))) for _, t, feature in run.outputs()]
    names = [name for name, _, _ in run.outputs()]
    return dict(zip(names, out.split(sizes, dim=out.dim() - 1), strict=True))


def hand_plan(
    collection: nn.Module,
    tables: list[TableCase],
    sharder: Any,
    width: int = 4,
    kernel: str | None = None,
    on_first: bool = False,
) -> EmbeddingModuleShardingPlan:
    """Tables are dealt to ranks and hosts in turn, columns unevenly; ``kernel`` in place of the usual ones.

    ``on_first``: the first rank, and the first host, own what need not be on all.
    """
    generators = {t.name: placement(t.sharding, 0 if on_first else i, t.dim, width) for i, t in enumerate(tables)}
    plan = plan_of(collection, generators, sharder)
    for sharding in plan.values():
        sharding.compute_kernel = kernel or ("dense" if sharding.sharding_type == "data_parallel" else "fused")
    return plan


def plan_of_run(run: Run, model: Model, sharders: list[Any], **by_hand: Any) -> EmbeddingModuleShardingPlan:
    """The planner's plan under constraints, with hand-written entries for the tables that ask for them."""
    plan = EmbeddingModuleShardingPlan()
    if any(t.plan == "planner" for t in run.tables):
        constraints = {
            t.name: ParameterConstraints(sharding_types=[t.sharding], min_partition=PLANNED_WIDTH) for t in run.tables
        }
        topology = Topology(
            world_size=dist.get_world_size(),
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            compute_device=own_device().type,
        )
        planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
        planned = planner.collective_plan(model, sharders, dist.GroupMember.WORLD).plan["collection"]
        assert isinstance(planned, EmbeddingModuleShardingPlan)
        plan.update(planned)
    # Column shards of sequences are all of one width, in TorchRec: those by hand as wide as the planner's.
    width = 4 if run.pooled else PLANNED_WIDTH
    tables = [t for t in run.tables if t.plan == "hand"]
    by_hand = {"kernel": "dense" if run.optimizer in DENSE else None} | by_hand
    plan.update(hand_plan(model.collection, tables, run.sharder(sharders), width, **by_hand))
    assert {name: s.sharding_type for name, s in plan.items()} == {t.name: t.sharding for t in run.tables}
    return plan


def shard_run(
    run: Run,
    sharders: list[Any] | None = None,
    collection: nn.Module | None = None,
    model_type: type[Model] = Model,
    **by_hand: Any,
) -> DistributedModelParallel:
    """The run's model, built on the meta device and sharded, with the initial values of the run.

    Args:
        by_hand: arguments of `hand_plan`.
    """
    model = model_type(run.collection("meta") if collection is None else collection)
    sharders = sharders or run.sharders()
    return distributed(model, plan_of_run(run, model, sharders, **by_hand), sharders, Model(run.initial()))


@dataclass
class Trained:
    """The results of a rank: its outputs by name and step, its pieces of the states, and the column cuts."""

    outputs: dict[str, list[Any]]
    state: dict[str, Pieces]
    optimizer_state: dict[str, Pieces]
    columns: dict[str, list[tuple[int, int]]]


def train(
    rank: int,
    world_size: int,
    run: Run,
    fused_params: dict[str, Any] | None = None,
    codecs: dict[str, Any] | None = None,
    **by_hand: Any,
) -> Trained:
    """Runs on a rank."""
    return trained(rank, world_size, run, shard_run(run, run.sharders(fused_params, codecs), **by_hand))


def trained(
    rank: int, world_size: int, run: Run, dmp: DistributedModelParallel, after: Callable[[], object] = lambda: None
) -> Trained:
    """Trains a sharded model, with a call at the end of every step."""
    optimizers: list[Any] = [dmp.fused_optimizer]
    if run.optimizer in DENSE:
        dense = dict(in_backward_optimizer_filter(dmp.named_parameters()))
        optimizers.append(KeyedOptimizerWrapper(dense, _dense_optimizer(run.optimizer)))
    batches = [run.batch(step).part(rank, world_size) for step in range(run.steps)]
    outputs: dict[str, list[Any]] = {name: [] for name, _, _ in run.outputs()}
    steps = steps_of(dmp, map(run.own_batch, range(run.steps)), optimizers)
    for batch, out in zip(batches, steps, strict=True):
        for name, part in parts_of(run, batch, out).items():
            outputs[name].append(numpy_of(part))
        after()
    return Trained(outputs, own_weights(dmp), own_state(dmp), columns_of(dmp))


def _dense_optimizer(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    if name == "dense_sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=LR)
    return lambda parameters: torch.optim.Adagrad(parameters, lr=LR, eps=DENSE_EPS)


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
