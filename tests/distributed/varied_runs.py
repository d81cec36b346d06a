"""Tables in all their variety, trained by a hand-written plan on whatever ranks there are."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pairwise import pairwise
from parity_model import (
    LR,
    Batch,
    Model,
    Run,
    TableCase,
    columns_of,
    global_batch,
    hand_plan,
    loss_of,
    optimizer_state_of,
    shard,
    sharders_of,
    weights_of,
)
from pieces import Pieces
from ranks import own_device
from test_parity_pooled import SHARDINGS, possible
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

# The reference knows a dense optimizer by the rule of a fused one.
DENSE = {"dense_sgd": "sgd", "dense_adagrad": "adagrad"}
# Its state is of the type of the table, and 1e-8 is zero in fp16.
DENSE_EPS = 1e-3
FACTORS: dict[str, tuple[Any, ...]] = {
    "sharding": SHARDINGS,
    "optimizer": ("sgd", "adagrad", "rowwise_adagrad", "adam", *DENSE),
    "operation": ("mult", "add", "concat", "path"),
    "out_of_range": ("error", "clamp", "wrap", "unchecked"),
    "data_type": ("FP32", "FP16", "BF16"),
    "kind": (("strided", 2), ("explicit", 2), ("hash", 1), ("mixed_radix", 3)),
    "pooling": ("sum", "mean"),
    "weighted": (False, True),
}
SEQUENCE_FACTORS = {name: values for name, values in FACTORS.items() if name not in ("pooling", "weighted")} | {
    "sharding": ("table_wise", "column_wise", "row_wise", "data_parallel"),
    "index_dedup": (False, True),
}


def runs_of(factors: dict[str, tuple[Any, ...]], pooled: bool) -> dict[str, Run]:
    """Every pair of values of two factors, in one collection for the tables that can be of one."""
    tables: dict[tuple[str, bool, bool], list[TableCase]] = {}
    for case in pairwise(factors, possible):
        kind, k = case["kind"]
        named = ("sharding", "operation", "data_type", "out_of_range", "pooling")
        fields = {name: case[name] for name in named if name in case}
        name = "_".join([case["sharding"], f"{kind}{k}", *(str(v) for n, v in fields.items() if n != "sharding")])
        table = TableCase(name=name, kind=kind, k=k, **fields)
        key = case["optimizer"], case.get("weighted", False), case.get("index_dedup", False)
        if table not in tables.setdefault(key, []):
            tables[key].append(table)
    return {
        "-".join(
            ["bags" if pooled else "sequences", optimizer, *["weighted"] * weighted, *["dedup"] * index_dedup]
        ): Run(tuple(of_run), optimizer, weighted, pooled, wild_ids=True, index_dedup=index_dedup)
        for (optimizer, weighted, index_dedup), of_run in sorted(tables.items())
    }


@dataclass
class Outcome:
    """The tables of a rank at the end, and its outputs by name and step."""

    outputs: dict[str, list[Any]]
    state: dict[str, Pieces]
    optimizer_state: dict[str, Pieces]
    columns: dict[str, list[tuple[int, int]]]


def train_all(rank: int, world_size: int, runs: dict[str, Run]) -> dict[str, Outcome]:
    """Runs on a rank."""
    return {name: train_varied(rank, world_size, run) for name, run in runs.items()}


def train_varied(rank: int, world_size: int, run: Run, **arguments: Any) -> Outcome:
    """A few steps, of `sharded` with the arguments."""
    dmp = sharded(run, **arguments)
    dense = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    optimizers: list[Any] = [dmp.fused_optimizer]
    if run.optimizer in DENSE:
        optimizers.append(KeyedOptimizerWrapper(dense, _dense_optimizer(run.optimizer)))
    outputs: dict[str, list[Any]] = {name: [] for name, _, _ in run.outputs()}
    for step in range(run.steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        batch = global_batch(run, step).part(rank, world_size)
        out = dmp(batch.kjt(run.weighted).to(own_device()))
        for (name, table, feature), value in zip(run.outputs(), parts_of(run, batch, out.detach()), strict=True):
            outputs[name].append(value.cpu().numpy().copy())
            assert value.numel() == table.dim * (run.bags // world_size if run.pooled else _ids(batch, feature))
        loss_of(out, world_size).backward()
        for optimizer in optimizers:
            optimizer.step()
    return Outcome(outputs, weights_of(dmp), optimizer_state_of(dmp), columns_of(dmp))


def sharded(
    run: Run,
    fused_params: dict[str, Any] | None = None,
    codecs: dict[str, Any] | None = None,
    on_first: bool = False,
) -> DistributedModelParallel:
    """The run's model by a hand-written plan, with the initial values of the run.

    Args:
        fused_params: in the place of those of the run's optimizer.
        codecs: of quantised communication.
        on_first: the first rank, and the first node, own what need not be on all.
    """
    sharders = sharders_of(run, {} if run.optimizer in DENSE else fused_params)
    sharders[0 if run.pooled else 1]._qcomm_codecs_registry = codecs
    return shard(run, sharders, plan_of=partial(_plan, on_first=on_first))


def _plan(run: Run, model: Model, sharders: list[Any], on_first: bool) -> ShardingPlan:
    width = 4 if run.pooled else 8
    plan = EmbeddingModuleShardingPlan()
    for tables in [[t] for t in run.tables] if on_first else [list(run.tables)]:
        plan.update(hand_plan(model.collection, tables, sharders[0 if run.pooled else 1], width))
    if run.optimizer in DENSE:
        plan.update({name: dataclasses.replace(of, compute_kernel="dense") for name, of in plan.items()})
    return ShardingPlan({"collection": plan})


def _dense_optimizer(name: str) -> Any:
    def make(parameters: Any) -> torch.optim.Optimizer:
        if name == "dense_sgd":
            return torch.optim.SGD(parameters, lr=LR)
        return torch.optim.Adagrad(parameters, lr=LR, eps=DENSE_EPS)

    return make


def parts_of(run: Run, batch: Batch, out: Tensor) -> list[Tensor]:
    """Takes apart what `Model`, or the reference, lays end to end."""
    if run.pooled:
        return list(out.split([table.dim for _, table, _ in run.outputs()], dim=1))
    return list(out.split([table.dim * _ids(batch, feature) for _, table, feature in run.outputs()]))


def _ids(batch: Batch, feature: str) -> int:
    return sum(len(bag) for bag in batch.ids[feature])
