"""Replicas: `DistributedDataParallel` reduces their gradients, and then each rank steps them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from torchrec_qr.distributed.customized_kernel import is_fused, layout_of
from torchrec_qr.distributed.fused_optimizer import FusedOptimizerHolder, RowOptimizer, step_replicas
from torchrec_qr.distributed.fused_params import update_rule
from torchrec_qr.distributed.global_tensor import ShardGroup
from torchrec_qr.distributed.node_env import Peers
from torchrec_qr.distributed.stored_partition import StoredPartition


class ReplicatedPartitions(NamedTuple):
    """The replicas in a step, by table and number of the partition.

    Args:
        weights (dict[tuple[str, int], Tensor]): their weights in the graph of the step.
        touched (dict[tuple[str, int], Tensor]): see `fused_optimizer.RowOptimizer.touched_of`.
    """

    weights: dict[tuple[str, int], Tensor]
    touched: dict[tuple[str, int], Tensor]


class Replicas(nn.Module):
    """The replicas of a sharding type, as parameters whose gradients `DistributedDataParallel` reduces.

    Args:
        tables (Sequence[ShardedEmbeddingTable]): the tables of a sharding type on all ranks, so that all ranks reduce
            the same parameters.
        device (torch.device | None): the device of the parameters.
    """

    def __init__(self, tables: Sequence[ShardedEmbeddingTable], device: torch.device | None) -> None:
        super().__init__()
        self.partitions: list[StoredPartition] = []
        self.parameters_of: dict[tuple[str, int], nn.Parameter] = {}
        self.optimizer_of: dict[Tensor, RowOptimizer] = {}
        # The factor of gradients of parameters without a fused optimizer, which `replicate` sets.
        self.gradient_scale = 1.0
        holders = []
        for table in tables:
            layout = layout_of(table)
            replicated = (j for j in range(layout.config.num_partitions) if layout.is_replicated(j))
            stored = [StoredPartition(layout, j, is_fused(table), device) for j in replicated]
            self.partitions += stored
            self.parameters_of.update((p.key, p.reduced) for p in stored)
            if is_fused(table) and stored:
                optimizer = RowOptimizer(stored, update_rule(table.name, table.fused_params or {}), ShardGroup(None))
                holders.append(FusedOptimizerHolder(optimizer))
                self.optimizer_of.update((p.reduced, optimizer) for p in stored)
        if self.parameters_of and not any(p.requires_grad for p in self.parameters_of.values()):
            raise NotImplementedError(
                f"tables {sorted({name for name, _ in self.parameters_of})}: all frozen, and held whole by every rank "
                "without a fused optimizer, so that nothing is left for DistributedDataParallel to reduce; allowed: a "
                "fused optimizer, under which a table may be frozen and released at any time"
            )
        # The masks in which a lookup marks the rows that it reads: see `RowOptimizer.touched_of`.
        masks = {leaf: mask for optimizer in self.optimizer_of.values() for leaf, mask in optimizer.touched_of.items()}
        self.touched_of = {p.key: masks[p.reduced] for p in self.partitions if p.reduced in masks}
        self.weights = nn.ParameterList(self.parameters_of.values())
        self.optimizers = nn.ModuleList(holders)

    def forward(self) -> list[Tensor]:
        """Returns views of the parameters, because DDP reduces the gradients of a module's outputs."""
        for p in self.optimizer_of:
            p.grad = None  # no other optimizer clears it
        views = [p.view_as(p) for p in self.weights]
        if self.gradient_scale != 1.0:
            for p, view in zip(self.weights, views, strict=True):
                if view.requires_grad and p not in self.optimizer_of:
                    view.register_hook(self._scaled)
        return views

    def _scaled(self, grad: Tensor) -> Tensor:
        # Do not multiply in place, because partitions share one tensor of gradients under ``add``.
        return grad * self.gradient_scale

    def warm_up(self) -> None:
        """Compiles the kernels that step the parameters on a GPU."""
        for p, optimizer in self.optimizer_of.items():
            optimizer.warm_up(p)


@dataclass(frozen=True)
class _Reduction:
    pg: dist.ProcessGroup
    average: bool
    peers: Peers | None
    optimizer_of: dict[Tensor, RowOptimizer]


def replicate(
    module: nn.Module, pg: dist.ProcessGroup, average: bool, peers: Peers | None = None
) -> DistributedDataParallel:
    """Wraps ``module`` in DDP, unless it is wrapped, and steps the replicas in it after their reduction.

    Args:
        module (nn.Module): a module with replicas, which may be wrapped in DDP.
        pg (dist.ProcessGroup): the ranks.
        average (bool): whether to average gradients over ranks, as in data-parallel. Otherwise they are summed, because
            the backward of TorchRec's collectives has divided them by W.
        peers (Peers | None): the ranks with copies of the tables, if these collectives have divided gradients by the
            ranks of a node alone.
    """
    if not isinstance(module, DistributedDataParallel):
        module = DistributedDataParallel(module, process_group=pg, gradient_as_bucket_view=True)
    optimizer_of: dict[Tensor, RowOptimizer] = {}
    for child in module.modules():
        if isinstance(child, Replicas):
            optimizer_of.update(child.optimizer_of)
            # Always average the gradient for a dense optimizer, because it may have that of an earlier backward, which
            # is the same on all ranks. Multiplied by W, the average is a sum.
            child.gradient_scale = 1.0 if average else float(pg.size())
    module.register_comm_hook(_Reduction(pg, average, peers, optimizer_of), _reduce_and_step)
    return module


def step_alone(module: nn.Module) -> None:
    """Steps the replicas in ``module`` by this rank's gradients, without a reduction."""
    for child in module.modules():
        if isinstance(child, Replicas):
            for leaf, optimizer in child.optimizer_of.items():
                leaf.register_post_accumulate_grad_hook(partial(_step_alone, optimizer))


def _step_alone(optimizer: RowOptimizer, leaf: Tensor) -> None:
    assert leaf.grad is not None
    replica = optimizer.replica(leaf, leaf.grad.float().contiguous(), optimizer.touched_of.get(leaf))
    if replica is not None:
        step_replicas([replica])
    leaf.grad = None


def _reduce_and_step(reduction: _Reduction, bucket: dist.GradBucket) -> Future[Tensor]:
    optimizers, buffer = reduction.optimizer_of, bucket.buffer()
    parameters = bucket.parameters()
    # Sum in fp32, because a sum in the storage type stops to grow, and may overflow in fp16.
    summed = buffer.float()
    gradients = bucket.gradients()
    if summed is not buffer:
        first = buffer.storage_offset()
        gradients = [summed[g.storage_offset() - first :][: g.numel()].view_as(g) for g in gradients]
    plain = [grad for p, grad in zip(parameters, gradients, strict=True) if p not in optimizers]
    for averaged in [summed] if reduction.average else plain:
        averaged.div_(reduction.pg.size())
    if reduction.peers is not None:
        summed.div_(reduction.peers.divisor)
    masks = {p: optimizers[p].touched_of[p] for p in parameters if p in optimizers and p in optimizers[p].touched_of}
    touched = torch.cat(list(masks.values())) if masks else None
    touched_work = None
    if touched is not None:
        touched_work = dist.all_reduce(touched, dist.ReduceOp.MAX, group=reduction.pg, async_op=True)

    def step(_: Future[list[Tensor]]) -> Tensor:
        for tensor in (summed, touched):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        looked_up: dict[Tensor, Tensor] = {}
        if touched is not None:
            assert touched_work is not None
            touched_work.wait()
            looked_up = dict(zip(masks, touched.split([m.numel() for m in masks.values()]), strict=True))
        fused = [(p, grad) for p, grad in zip(parameters, gradients, strict=True) if p in optimizers]
        replicas = [optimizers[p].replica(p, grad, looked_up.get(p)) for p, grad in fused]
        step_replicas([replica for replica in replicas if replica is not None])
        return buffer if summed is buffer else buffer.copy_(summed)

    # Chain to this future, because NCCL's futures are complete at once. Its callback runs on a stream that waits for
    # the sum, and DDP waits for the callback. A future of several futures waits for none of them.
    return dist.all_reduce(summed, group=reduction.pg, async_op=True).get_future().then(step)
