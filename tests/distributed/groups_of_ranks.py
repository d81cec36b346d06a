"""TorchRec's 2D parallelism on gloo ranks: ``DMPCollection`` without its assertion of CUDA."""

import ast
import inspect
import os
from typing import Any

import torch
import torch.distributed as dist
from parity_model import Run, Trained, columns_of, hand_plan, parts_of
from pieces import numpy_of
from placements import SHARDING_GROUP
from ranks import own_device
from sharded_model import Model, loss_of, own_state, own_weights
from torch import Tensor
from torchrec.distributed import model_parallel
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

GROUP_SIZE = 2


def without_assertion() -> type[DMPCollection]:
    """Returns the class of TorchRec's source, less the assertion that ``device`` is CUDA or MTIA."""
    lines, first = inspect.getsourcelines(DMPCollection)
    tree = ast.increment_lineno(ast.parse("".join(lines)), first - 1)
    (cls,) = tree.body
    assert isinstance(cls, ast.ClassDef)
    (init,) = (f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
    asserted = [s for s in init.body if isinstance(s, ast.Assert) and "only supports CUDA" in ast.unparse(s)]
    (assertion,) = asserted
    init.body.remove(assertion)
    names = dict(vars(model_parallel))
    exec(compile(tree, inspect.getfile(DMPCollection), "exec"), names)
    out: type[DMPCollection] = names["DMPCollection"]
    return out


class Groups(without_assertion()):  # type: ignore[misc]
    """``DMPCollection`` whose ``sync()`` averages by gloo, which has sums alone."""

    def _allreduce_tensors(self, of: Any, tensors_dict: dict[torch.dtype, list[Tensor]], *_: Any, **__: Any) -> None:
        pg = getattr(of, "replica_pg", of)
        for tensors in tensors_dict.values():
            for tensor in tensors:
                dist.all_reduce(tensor, group=pg)
                tensor.div_(pg.size())


def in_groups(
    model: Model,
    plan: EmbeddingModuleShardingPlan,
    sharders: list[Any],
    values: Model | None = None,
    **arguments: Any,
) -> Any:
    """A model whose collection groups of two ranks shard, with the unsharded model's values loaded."""
    assert dist.group.WORLD is not None
    dmp = Groups(
        model,
        own_device(),
        ShardingPlan({"collection": plan}),
        dist.get_world_size(),
        GROUP_SIZE,
        dist.group.WORLD,
        sharders=sharders,
        **{"node_group_size": int(os.environ["LOCAL_WORLD_SIZE"])} | arguments,
    )
    if values is not None:
        dmp.load_state_dict({name: value.clone() for name, value in values.state_dict().items()})
    return dmp


def shard_run_in_groups(
    run: Run,
    use_inter_host_allreduce: bool = False,
    sharders: list[Any] | None = None,
    values: bool = True,
    kernel: str | None = None,
    ranks: int = GROUP_SIZE,
    **arguments: Any,
) -> Any:
    """The run's model on groups of two ranks, by a plan by hand, with the run's initial values."""
    os.environ[SHARDING_GROUP] = str(ranks)
    sharders = sharders or run.sharders()
    model = Model(run.collection("meta"))
    plan = hand_plan(model.collection, list(run.tables), run.sharder(sharders), 4 if run.pooled else 8, kernel)
    return in_groups(
        model,
        plan,
        sharders,
        Model(run.initial()) if values else None,
        use_inter_host_allreduce=use_inter_host_allreduce,
        **arguments,
    )


def place_of(dmp: Any) -> tuple[int, int]:
    """The number of this rank's sharding group, and its rank in it."""
    replicas, ranks = dmp.device_mesh.get_coordinate()
    return replicas, ranks


def train_in_groups(
    run: Run, dmp: DistributedModelParallel, steps_of_group: tuple[list[int], list[int]], synced: tuple[int, ...]
) -> Trained:
    """Trains each group on the batches of its numbers, and averages after the steps ``synced``."""
    group, rank = place_of(dmp)
    outputs: dict[str, list[Any]] = {name: [] for name, _, _ in run.outputs()}
    for i, step in enumerate(steps_of_group[group]):
        own = run.batch(step).part(rank, GROUP_SIZE)
        dmp.zero_grad()
        out = dmp(own.kjt(run.weighted, run.int32))
        loss_of(out, GROUP_SIZE).backward()
        for name, part in parts_of(run, own, out.detach()).items():
            outputs[name].append(numpy_of(part))
        if i in synced:
            dmp.sync()
    return Trained(outputs, own_weights(dmp), own_state(dmp), columns_of(dmp))
