"""Places a model on the ranks and gives every parameter exactly one optimizer."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from launch.config import Job
from launch.process_group import bound_waits
from launch.sections import OptimizerSection
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder, optimizer_of_each_parameter

_FUSED = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
}
_DENSE: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
}


@dataclass(frozen=True)
class Parallel:
    """A model on its ranks, its plan, and its optimizers: fused for embeddings, dense for all else."""

    model: DistributedModelParallel
    plan: ShardingPlan
    fused: KeyedOptimizer
    dense: KeyedOptimizer

    @property
    def optimizer(self) -> CombinedOptimizer:
        return CombinedOptimizer([self.fused, self.dense])


def parallelize(task: nn.Module, job: Job, device: torch.device) -> Parallel:
    """Plans ``task`` and shards it. All ranks must call it.

    Raises:
        NotImplementedError: an optimizer that embedding tables do not have.
        PlannerError: of TorchRec's planner; no plan fits.
        ValueError: a parameter that no optimizer steps, or two do.
    """
    fused_params = _fused_params(job.optimizer.sparse)
    sharders: list[Any] = [
        EmbeddingBagCollectionSharder(fused_params=fused_params),
        CompositionalEmbeddingBagCollectionSharder(fused_params=fused_params),
    ]
    world_size = dist.get_world_size()
    hbm: dict[str, Any] = {} if job.planner.hbm_gib is None else {"hbm_cap": int(job.planner.hbm_gib * 2**30)}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size, device.type, local_world_size=get_local_size(world_size), **hbm),
        batch_size=job.train.batch_size,
        constraints=job.planner.parameter_constraints(),
        storage_reservation=FixedPercentageStorageReservation(percentage=job.planner.storage_reserve),
    )
    plan = planner.collective_plan(task, sharders, dist.GroupMember.WORLD)
    model = DistributedModelParallel(task, device=device, plan=plan, sharders=sharders)
    bound_waits()
    dense = _dense_optimizer(model, job)
    optimizer_of_each_parameter(model, [dense])
    return Parallel(model, plan, model.fused_optimizer, dense)


def _fused_params(section: OptimizerSection) -> dict[str, Any]:
    if section.name not in _FUSED:
        raise NotImplementedError(f"optimizer.sparse.name is {section.name!r}; allowed: {', '.join(map(repr, _FUSED))}")
    return {"optimizer": _FUSED[section.name], "learning_rate": section.lr, "eps": section.eps}


def _dense_optimizer(model: nn.Module, job: Job) -> KeyedOptimizer:
    """Of what is not fused: layers, and TorchRec's own data-parallel tables, by the rule of ``sparse``."""
    left = {name: p for name, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad}
    tables = {name: p for name, p in left.items() if ".embedding_bags." in name}
    layers = {name: p for name, p in left.items() if name not in tables}
    of_layers: KeyedOptimizer = KeyedOptimizerWrapper(layers, partial(_make, job.optimizer.dense))
    if job.train.grad_clip is not None:
        of_layers = GradientClippingOptimizer(of_layers, GradientClipping.NORM, job.train.grad_clip)
    optimizers: list[KeyedOptimizer | tuple[str, KeyedOptimizer]] = [of_layers]
    if tables:
        optimizers.append(KeyedOptimizerWrapper(tables, partial(_make, job.optimizer.sparse)))
    return CombinedOptimizer(optimizers)


def _make(section: OptimizerSection, parameters: Any) -> torch.optim.Optimizer:
    eps = {} if section.name == "sgd" else {"eps": section.eps}
    return _DENSE[section.name](parameters, lr=section.lr, **eps)
