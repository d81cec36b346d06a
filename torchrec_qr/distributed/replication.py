"""Reducing and stepping replicated partitions: the communication hook of `DistributedDataParallel`."""

from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from torchrec_qr.distributed.lookup import Replicas
from torchrec_qr.distributed.optimizer import RowOptimizer
from torchrec_qr.distributed.sharding import PooledLookup, SequenceLookup
from torchrec_qr.distributed.shards import DATA_PARALLEL


@dataclass(frozen=True)
class _Reduction:
    pg: dist.ProcessGroup
    average: bool
    optimizer_of: dict[Tensor, RowOptimizer]
    touched_of: dict[Tensor, Tensor]


def replicate(module: nn.Module, pg: dist.ProcessGroup, average: bool) -> DistributedDataParallel:
    """Wraps ``module`` in DDP, or takes a wrapped one, so that the replicas in it are stepped once reduced.

    Args:
        average: whether gradients are averaged over ranks, as in data-parallel; otherwise summed, which is right
            behind TorchRec's collectives, whose backward has divided by the world size already.
    """
    if not isinstance(module, DistributedDataParallel):
        module = DistributedDataParallel(module, process_group=pg, gradient_as_bucket_view=True)
    optimizer_of: dict[Tensor, RowOptimizer] = {}
    touched_of: dict[Tensor, Tensor] = {}
    for child in module.modules():
        if isinstance(child, Replicas):
            optimizer_of.update(child.optimizer_of)
            touched_of.update((child.parameters_of[key], touched) for key, touched in child.touched_of.items())
            # What is left to a dense optimizer may hold the gradient of an earlier backward, the same on all ranks: so
            # it must be averaged in any case, and a sum is the average of larger gradients.
            child.gradient_scale = 1.0 if average else float(pg.size())
    module.register_comm_hook(_Reduction(pg, average, optimizer_of, touched_of), _reduce_and_step)
    return module


def replicate_lookups(collection: Any) -> None:
    """Prepares the lookups of a sharded collection, of which TorchRec has wrapped the data-parallel ones in DDP.

    It has not if ``mark_data_parallel_skip_grad_sync`` of TorchRec 1.9 asks for no reduction of their gradients: each
    rank then steps its replicas of data-parallel tables alone.

    Raises:
        RuntimeError: TorchRec has left a data-parallel lookup unwrapped, and nobody asked for that.
    """
    pg: dist.ProcessGroup = collection._env.process_group
    is_marked: bool = getattr(collection, "_skip_data_parallel_grad_sync", False)
    for lookup in collection._lookups:
        own = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
        assert isinstance(own, PooledLookup | SequenceLookup)
        if not own.is_data_parallel:
            own.replicate(partial(replicate, pg=pg, average=False))
        elif isinstance(lookup, DistributedDataParallel):
            replicate(lookup, pg, average=True)
        elif is_marked:
            step_alone(own)
        else:
            plan = collection.module_sharding_plan
            tables = [name for name, sharding in plan.items() if sharding.sharding_type == DATA_PARALLEL]
            raise RuntimeError(
                f"{type(collection).__name__}: TorchRec {metadata.version('torchrec')} has not wrapped the lookup of "
                f"data_parallel tables {tables} in DistributedDataParallel, which would reduce their gradients; "
                "allowed: a version of TorchRec that `torchrec-qr doctor` calls tested"
            )


def step_alone(module: nn.Module) -> None:
    """Has the replicas in ``module`` stepped by this rank's gradients, which nobody reduces."""
    for child in module.modules():
        if isinstance(child, Replicas):
            for key, p in child.parameters_of.items():
                if p in child.optimizer_of:
                    hook = partial(_step_alone, child.optimizer_of[p], child.touched_of.get(key))
                    p.register_post_accumulate_grad_hook(hook)


def _step_alone(optimizer: RowOptimizer, touched: Tensor | None, p: Tensor) -> None:
    assert p.grad is not None
    _step(optimizer, touched, p, p.grad)
    p.grad = None


def _step(optimizer: RowOptimizer, touched: Tensor | None, p: Tensor, grad: Tensor) -> None:
    if touched is None:
        # The other rows are untouched, or as good as that under the rules that do not count steps.
        optimizer.update_where(p, grad.ne(0).any(dim=1), grad)
    else:
        optimizer.update_where(p, touched.bool(), grad)
        touched.zero_()


def _reduce_and_step(reduction: _Reduction, bucket: dist.GradBucket) -> Future[Tensor]:
    parameters, buffer = bucket.parameters(), bucket.buffer()
    # A sum over many ranks in the storage type stops growing, and in fp16 it may overflow.
    summed = buffer.float()
    first = buffer.storage_offset()
    gradients = [summed[g.storage_offset() - first :][: g.numel()].view_as(g) for g in bucket.gradients()]
    for p, grad in zip(parameters, gradients, strict=True):
        if reduction.average or p not in reduction.optimizer_of:
            grad.div_(reduction.pg.size())
    masks = [reduction.touched_of[p] for p in parameters if p in reduction.touched_of]
    touched = torch.cat(masks) if masks else None
    touched_work = None
    if touched is not None:
        touched_work = dist.all_reduce(touched, dist.ReduceOp.MAX, group=reduction.pg, async_op=True)

    def step(_: Future[list[Tensor]]) -> Tensor:
        for tensor in (summed, touched):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        if touched is not None:
            assert touched_work is not None
            touched_work.wait()
            for mask, reduced in zip(masks, touched.split([m.numel() for m in masks]), strict=True):
                mask.copy_(reduced)
        for p, grad in zip(parameters, gradients, strict=True):
            if p in reduction.optimizer_of:
                _step(reduction.optimizer_of[p], reduction.touched_of.get(p), p, grad)
        return buffer if summed is buffer else buffer.copy_(summed)

    # NCCL's futures are complete at once. A callback of this very future runs on a stream that waits for the sum, and
    # DDP waits for what the callback does. A future made of several futures would wait for none of them.
    return dist.all_reduce(summed, group=reduction.pg, async_op=True).get_future().then(step)
