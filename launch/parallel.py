"""Places a model on the ranks and gives every parameter exactly one optimizer."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from launch.config import Job
from launch.memory_errors import tables_named
from launch.sections import OptimizerSection
from launch.steady_buckets import keep_buckets
from launch.table_bytes import bytes_on_rank
from launch.table_optimizer import DataParallelTableOptimizer
from launch.topology import planned_topology
from torchrec_qr.cli.sizing.saved_plan import saved_plan
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder, optimizer_of_each_parameter
from torchrec_qr.distributed.fused_params import OPTIMIZERS, OptimizerName
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner
from torchrec_qr.planner.planner import plan_of_rank_0

_DENSE: dict[OptimizerName, Any] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
}
_DECOUPLED: dict[OptimizerName, Any] = {
    "adam": torch.optim.AdamW,
    "amsgrad": partial(torch.optim.AdamW, amsgrad=True),
}
_MODES = {"l2": WeightDecayMode.L2, "decoupled": WeightDecayMode.DECOUPLE, "none": WeightDecayMode.NONE}


@dataclass(frozen=True)
class Parallel:
    """A model on its ranks.

    Args:
        model (DistributedModelParallel): the model.
        shardings (dict[str, ParameterSharding]): of each table that is planned.
        held (dict[str, int]): bytes of values of each table on this rank.
        sparse (KeyedOptimizer): of embeddings, which is fused but for TorchRec's own data-parallel tables.
        dense (KeyedOptimizer): of all else.
    """

    model: DistributedModelParallel
    shardings: dict[str, ParameterSharding]
    held: dict[str, int]
    sparse: KeyedOptimizer
    dense: KeyedOptimizer

    @property
    def optimizer(self) -> CombinedOptimizer:
        return CombinedOptimizer([self.sparse, self.dense])


def parallelize(task: nn.Module, job: Job, device: torch.device) -> Parallel:
    """Plans ``task`` and shards it. All ranks must call it.

    Raises:
        PlannerError: no plan fits, or another rank refuses the plan of a file.
        ConfigError: the plan of a file does not fit the job.
        ValueError: a parameter that no optimizer steps, or two do; a card with less memory than the config names.
        OutOfMemoryError: torch's; names the tables of this rank, and what would fit.
    """
    rule = job.optimizer.sparse
    fused_params = {**OPTIMIZERS[rule.name].fused_params, "learning_rate": rule.lr, "eps": rule.eps}
    if rule.weight_decay > 0:
        fused_params |= {"weight_decay": rule.weight_decay, "weight_decay_mode": _MODES[rule.weight_decay_mode]}
    sharders: list[Any] = [
        EmbeddingBagCollectionSharder(fused_params=fused_params),
        CompositionalEmbeddingBagCollectionSharder(fused_params=fused_params),
    ]
    planner = CompositionalEmbeddingShardingPlanner(
        topology=planned_topology(job, device),
        batch_size=job.train.batch_size,
        constraints=job.planner.parameter_constraints(),
        ranks=job.planner.bound_ranks(),
        same_rank_as=job.planner.same_rank_as(),
        storage_reservation=FixedPercentageStorageReservation(percentage=job.planner.storage_reserve),
        dense_optimizer=partial(_make, job.optimizer.sparse),
    )
    # Plan nothing if no sharder takes the collection, because the planner refuses such a model.
    shardable = {sharder.module_type for sharder in sharders}
    planned = any(type(module) in shardable for module in task.modules())
    plan = _plan(job, task, sharders, planner) if planned else ShardingPlan({})
    shardings: dict[str, ParameterSharding] = {}
    for of_module in plan.plan.values():
        shardings.update(cast(EmbeddingModuleShardingPlan, of_module))
    held = bytes_on_rank(task, shardings, dist.get_rank())
    with tables_named("placing the model", held, device):
        model = DistributedModelParallel(task, device=device, plan=plan, sharders=sharders)
    if device.type == "cpu":  # where a job goes on bit for bit
        keep_buckets(model)
    left = {name: p for name, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad}
    tables = {name: p for name, p in left.items() if ".embedding_bags." in name}
    layers = {name: p for name, p in left.items() if name not in tables}
    of_tables = [DataParallelTableOptimizer(tables, partial(_make, rule))] if tables else []
    dense: KeyedOptimizer = KeyedOptimizerWrapper(layers, partial(_make, job.optimizer.dense))
    if job.train.grad_clip is not None:
        dense = GradientClippingOptimizer(dense, GradientClipping.NORM, job.train.grad_clip)
    optimizer_of_each_parameter(model, [*of_tables, dense])
    return Parallel(model, shardings, held, CombinedOptimizer([model.fused_optimizer, *of_tables]), dense)


def _plan(
    job: Job, task: nn.Module, sharders: list[Any], planner: CompositionalEmbeddingShardingPlanner
) -> ShardingPlan:
    """Returns the plan of ``planner.plan_file`` if the job names one, else the planner's. All ranks must call it."""
    file = job.planner.plan_file
    if file is None:
        return planner.collective_plan(task, sharders, dist.GroupMember.WORLD)
    group = dist.group.WORLD
    assert group is not None
    return plan_of_rank_0(lambda: saved_plan(file, job.planner, task, sharders, planner.topology), group)


def _make(section: OptimizerSection, parameters: Any) -> torch.optim.Optimizer:
    eps = {} if section.name == "sgd" else {"eps": section.eps}
    made = _DECOUPLED if section.weight_decay_mode == "decoupled" else _DENSE
    return made[section.name](parameters, lr=section.lr, weight_decay=section.weight_decay, **eps)
