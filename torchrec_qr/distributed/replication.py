"""Partitions that every rank holds whole: `DistributedDataParallel` reduces their gradients, then they are stepped."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from torchrec_qr.distributed.customized_kernel import is_fused, layout_of
from torchrec_qr.distributed.fused_optimizer import FusedOptimizerHolder, RowOptimizer
from torchrec_qr.distributed.fused_params import update_rule
from torchrec_qr.distributed.stored_partition import StoredPartition


class Replicas(nn.Module):
    """Partitions that every rank holds whole, as parameters for `DistributedDataParallel` to reduce.

    Args:
        tables: the tables of one sharding type, of all ranks, so that all ranks hold and reduce the same parameters.
    """

    def __init__(self, tables: Sequence[ShardedEmbeddingTable], device: torch.device | None) -> None:
        super().__init__()
        self.partitions: list[StoredPartition] = []
        self.parameters_of: dict[tuple[str, int], nn.Parameter] = {}
        self.optimizer_of: dict[Tensor, RowOptimizer] = {}
        # Gradients of parameters that nothing steps in backward are multiplied by this; `replicate` sets it.
        self.gradient_scale = 1.0
        holders = []
        for table in tables:
            layout = layout_of(table)
            replicated = (j for j in range(layout.config.num_partitions) if layout.is_replicated(j))
            stored = [StoredPartition(layout, j, is_fused(table), device) for j in replicated]
            self.partitions += stored
            self.parameters_of.update((p.key, p.reduced) for p in stored)
            if is_fused(table) and stored:
                optimizer = RowOptimizer(stored, update_rule(table.name, table.fused_params or {}), pg=None)
                holders.append(FusedOptimizerHolder(optimizer))
                self.optimizer_of.update((p.reduced, optimizer) for p in stored)
        if self.parameters_of and not any(p.requires_grad for p in self.parameters_of.values()):
            raise NotImplementedError(
                f"tables {sorted({name for name, _ in self.parameters_of})}: all frozen, and held whole by every rank "
                "without a fused optimizer, so that nothing is left for DistributedDataParallel to reduce; allowed: a "
                "fused optimizer, under which a table may be frozen and released at any time"
            )
        # A lookup marks in these the rows that it reads, by table and number; see `RowOptimizer.touched_of`.
        masks = {leaf: mask for optimizer in self.optimizer_of.values() for leaf, mask in optimizer.touched_of.items()}
        self.touched_of = {p.key: masks[p.reduced] for p in self.partitions if p.reduced in masks}
        self.weights = nn.ParameterList(self.parameters_of.values())
        self.optimizers = nn.ModuleList(holders)

    def forward(self) -> list[Tensor]:
        """Returns the parameters as tensors of this step's graph: DDP reduces what is used of a module's outputs."""
        for p in self.optimizer_of:
            p.grad = None  # stepped in backward, so that nobody else clears it
        views = [p.view_as(p) for p in self.weights]
        if self.gradient_scale != 1.0:
            for p, view in zip(self.weights, views, strict=True):
                if view.requires_grad and p not in self.optimizer_of:
                    view.register_hook(self._scaled)
        return views

    def _scaled(self, grad: Tensor) -> Tensor:
        # Do not multiply in place, because under ``add`` the sibling partitions share the tensor of their gradient.
        return grad * self.gradient_scale

    def warm_up(self) -> None:
        """Has the kernels that step the parameters compiled, if they run on a GPU."""
        for p, optimizer in self.optimizer_of.items():
            optimizer.warm_up(p)


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
            # Average a gradient that is left to a dense optimizer in any case, because it may hold that of an earlier
            # backward, which is the same on all ranks. A sum is the average of larger gradients.
            child.gradient_scale = 1.0 if average else float(pg.size())
    module.register_comm_hook(_Reduction(pg, average, optimizer_of), _reduce_and_step)
    return module


def step_alone(module: nn.Module) -> None:
    """Has the replicas in ``module`` stepped by this rank's gradients, which nobody reduces."""
    for child in module.modules():
        if isinstance(child, Replicas):
            for leaf, optimizer in child.optimizer_of.items():
                leaf.register_post_accumulate_grad_hook(partial(_step_alone, optimizer))


def _step_alone(optimizer: RowOptimizer, leaf: Tensor) -> None:
    assert leaf.grad is not None
    optimizer.update_replica(leaf, leaf.grad)
    leaf.grad = None


def _reduce_and_step(reduction: _Reduction, bucket: dist.GradBucket) -> Future[Tensor]:
    optimizers, buffer = reduction.optimizer_of, bucket.buffer()
    parameters = bucket.parameters()
    # A sum over many ranks in the storage type stops growing, and in fp16 it may overflow.
    summed = buffer.float()
    first = buffer.storage_offset()
    gradients = [summed[g.storage_offset() - first :][: g.numel()].view_as(g) for g in bucket.gradients()]
    for p, grad in zip(parameters, gradients, strict=True):
        if reduction.average or p not in optimizers:
            grad.div_(reduction.pg.size())
    masks = [optimizers[p].touched_of[p] for p in parameters if p in optimizers and p in optimizers[p].touched_of]
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
            if p in optimizers:
                optimizers[p].update_replica(p, grad)
        return buffer if summed is buffer else buffer.copy_(summed)

    # NCCL's futures are complete at once. A callback of this very future runs on a stream that waits for the sum, and
    # DDP waits for what the callback does. A future made of several futures would wait for none of them.
    return dist.all_reduce(summed, group=reduction.pg, async_op=True).get_future().then(step)
