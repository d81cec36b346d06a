"""Reducing and stepping replicated partitions: the communication hook of `DistributedDataParallel`."""

from dataclasses import dataclass
from functools import partial

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
    average: bool
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
            # What is left to a dense optimizer may hold the gradient of an earlier backward, the same on all ranks: so
            # it must be averaged in any case, and a sum is the average of larger gradients.
            child.gradient_scale = 1.0 if average else float(pg.size())
    module.register_comm_hook(_Reduction(pg, average, optimizer_of), _reduce_and_step)
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
        world_size = reduction.pg.size()
        for p, grad in zip(parameters, gradients, strict=True):
            optimizer = reduction.optimizer_of.get(p)
            if optimizer is None or reduction.average:
                grad.div_(world_size)
            if optimizer is not None:
                # The other rows are untouched, or as good as that under every rule that there is.
                rows = grad.ne(0).any(dim=1).nonzero().squeeze(1)
                optimizer.update(p, rows, grad.index_select(0, rows))
        return reduced.value()[0]

    work = dist.all_reduce(bucket.buffer(), group=reduction.pg, async_op=True)
    return work.get_future().then(step)
