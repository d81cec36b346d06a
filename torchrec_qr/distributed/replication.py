"""Reducing and stepping replicated partitions: the communication hook of `DistributedDataParallel`."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from torchrec_qr.distributed.lookup import Replicas
from torchrec_qr.distributed.optimizer import RowOptimizer
from torchrec_qr.distributed.sharding import PooledLookup, SequenceLookup


@dataclass(frozen=True)
class _Reduction:
    pg: dist.ProcessGroup
    divisor: int
    optimizer_of: dict[Tensor, RowOptimizer]


def replicate(module: nn.Module, pg: dist.ProcessGroup, average: bool) -> DistributedDataParallel:
    """Wraps ``module`` in DDP, or takes a wrapped one, so that the replicas in it are stepped once reduced.

    Args:
        average: whether gradients are averaged over ranks, as in data-parallel; otherwise summed, which is right
            behind TorchRec's collectives, whose backward has divided by the world size already.
    """
    if not isinstance(module, DistributedDataParallel):
        module = DistributedDataParallel(module, process_group=pg, gradient_as_bucket_view=True)
    optimizer_of: dict[Tensor, RowOptimizer] = {}
    for child in module.modules():
        if isinstance(child, Replicas):
            optimizer_of.update(child.optimizer_of)
    module.register_comm_hook(_Reduction(pg, pg.size() if average else 1, optimizer_of), _reduce_and_step)
    return module


def replicate_lookups(lookups: list[nn.Module], pg: dist.ProcessGroup | None) -> None:
    """Prepares the lookups of a sharded collection, of which TorchRec has wrapped the data-parallel ones in DDP."""
    assert pg is not None
    for lookup in lookups:
        if isinstance(lookup, DistributedDataParallel):
            replicate(lookup, pg, average=True)
        elif isinstance(lookup, PooledLookup | SequenceLookup):
            lookup.replicate(partial(replicate, pg=pg, average=False))


def _reduce_and_step(reduction: _Reduction, bucket: dist.GradBucket) -> Future[Tensor]:
    parameters, gradients = bucket.parameters(), bucket.gradients()

    def step(reduced: Future[list[Tensor]]) -> Tensor:
        buffer = reduced.value()[0].div_(reduction.divisor)
        for p, grad in zip(parameters, gradients, strict=True):
            optimizer = reduction.optimizer_of.get(p)
            if optimizer is not None:
                optimizer.update(p, torch.arange(p.shape[0], device=p.device), grad)
        return buffer

    work = dist.all_reduce(bucket.buffer(), group=reduction.pg, async_op=True)
    return work.get_future().then(step)
