"""An all-to-all of pooled embeddings between processes on CPUs, and of their gradients.

TorchRec's ``PooledEmbeddingsAllToAll`` copies embeddings into new memory at each step. If rows are few, that is a large
part of a step on a CPU. Here a rank does not send its own part, and sends the others from the lookup's output. It
receives gradients in the memory that the backward reads, and uses memory again. The values are TorchRec's, bit for bit.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.distributed.comm_ops import get_gradient_division, get_use_sync_collectives
from torchrec.distributed.dist_data import PooledEmbeddingsAwaitable
from torchrec.distributed.embedding_sharding import BaseEmbeddingDist, EmbeddingShardingContext
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable

from torchrec_qr.ops.memory import recycled


def without_copies(
    output_dist: BaseEmbeddingDist[Any, Any, Any], device: torch.device | None
) -> BaseEmbeddingDist[Any, Any, Any]:
    """Returns a `PooledAllToAll` in place of an output dist of TorchRec's if their results are the same.

    They are the same for several processes, gloo, embeddings on a CPU (``device``), and no codecs. Otherwise the
    function returns ``output_dist``.
    """
    if (
        isinstance(output_dist, TwPooledEmbeddingDist)
        and output_dist._codecs is None
        and output_dist._pg.size() > 1
        and dist.get_backend(output_dist._pg) == "gloo"
        and device is not None
        and device.type == "cpu"
        and not get_use_sync_collectives()
    ):
        return PooledAllToAll(output_dist._pg, output_dist._dim_sum_per_rank, output_dist._callbacks or [])
    return output_dist


class PooledAllToAll(BaseEmbeddingDist[EmbeddingShardingContext, Tensor, Tensor]):
    """Sends a rank's columns of all samples, (Σ_r B_r, D_own), and receives all columns of its samples, (B, Σ_r D_r).

        out[b, columns of rank r] = local_r[b], for this rank's samples b

    The backward sends gradients the other way, and divides them by W if TorchRec does. It replaces
    ``TwPooledEmbeddingDist``.

    Args:
        pg (dist.ProcessGroup): the processes, with gloo.
        dim_sum_per_rank (list[int]): D_r of each.
        callbacks (list[Any]): functions that are applied to the output in turn.
    """

    def __init__(self, pg: dist.ProcessGroup, dim_sum_per_rank: list[int], callbacks: list[Any]) -> None:
        super().__init__()
        self._pg, self._dims, self._callbacks = pg, dim_sum_per_rank, callbacks

    @torch.compiler.disable
    def forward(self, local: Tensor, sharding_ctx: EmbeddingShardingContext | None = None) -> PooledEmbeddingsAwaitable:
        sizes = [] if sharding_ctx is None else sharding_ctx.batch_size_per_rank
        transfer = _Transfer(self._pg, self._dims, sizes or [local.shape[0] // self._pg.size()] * self._pg.size())
        out = PooledEmbeddingsAwaitable(_Received(transfer, _Send.apply(transfer, local)))
        out.callbacks.extend(self._callbacks)
        return out


class _Transfer:
    """The transfer of a batch, and afterwards of its gradient."""

    def __init__(self, pg: dist.ProcessGroup, dims: list[int], batch_sizes: list[int]) -> None:
        self.own = dist.get_rank(pg)
        self.columns = [slice(a, b) for a, b in pairwise(accumulate(dims, initial=0))]
        self.samples = [slice(a, b) for a, b in pairwise(accumulate(batch_sizes, initial=0))]
        self.result: list[Tensor] = []
        self._pg = pg
        self._works: list[dist.Work | None] = []
        self._sent: list[Tensor] = []

    def start(self, sent: list[Tensor], received: list[Tensor], result: list[Tensor]) -> None:
        """Starts to send and receive a contiguous tensor per other rank. `wait` returns ``result``."""
        others = [i for i in range(len(sent)) if i != self.own]
        self._works = [
            *(dist.irecv(received[i], group=self._pg, group_src=i) for i in others if received[i].numel()),
            *(dist.isend(sent[i], group=self._pg, group_dst=i) for i in others if sent[i].numel()),
        ]
        # Keep tensors until they are sent.
        self._sent, self.result = sent, result

    def wait(self) -> list[Tensor]:
        """Returns the result of `start` when all tensors have arrived."""
        for work in self._works:
            if work is not None:
                work.wait()
        result, self._works, self._sent, self.result = self.result, [], [], []
        return result


class _Received(Awaitable[Tensor]):
    def __init__(self, transfer: _Transfer, sent: Tensor) -> None:
        super().__init__()
        self._transfer, self._sent = transfer, sent

    def _wait_impl(self) -> Tensor:
        out: Tensor = _Receive.apply(self._transfer, self._sent)
        return out


class _Send(torch.autograd.Function):
    """Starts to send. The result has no elements, and only connects the graph to `_Receive`."""

    @staticmethod
    def forward(ctx: Any, transfer: _Transfer, local: Tensor) -> Tensor:
        ctx.transfer, ctx.shape = transfer, local.shape
        own = transfer.columns[transfer.own]
        # Make two dimensions, because a lookup without tables returns one.
        local = local.contiguous().view(transfer.samples[-1].stop, own.stop - own.start)
        sent = [local[s] for s in transfer.samples]
        kept = sent[transfer.own]
        received = [
            kept if i == transfer.own else recycled((len(kept), c.stop - c.start), local.dtype)
            for i, c in enumerate(transfer.columns)
        ]
        transfer.start(sent, received, received)
        return local.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.transfer.wait()
        return None, gradient.view(ctx.shape)


class _Receive(torch.autograd.Function):
    """Waits for the batch. The backward starts to send its gradient, and that of `_Send` waits for it."""

    @staticmethod
    def forward(ctx: Any, transfer: _Transfer, sent: Tensor) -> Tensor:
        ctx.transfer = transfer
        parts = transfer.wait()
        out = recycled((len(parts[0]), transfer.columns[-1].stop), sent.dtype)
        for columns, part in zip(transfer.columns, parts, strict=True):
            out[:, columns] = part
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        transfer: _Transfer = ctx.transfer
        divisor = len(transfer.columns) if get_gradient_division() else 1
        own = transfer.columns[transfer.own]
        result = recycled((transfer.samples[-1].stop, own.stop - own.start), gradient.dtype)
        received = [result[s] for s in transfer.samples]
        sent = []
        for i, columns in enumerate(transfer.columns):
            part = gradient[:, columns]
            into = received[i] if i == transfer.own else recycled(part.shape, part.dtype)
            sent.append(torch.div(part, divisor, out=into))
        transfer.start(sent, received, [result])
        return None, gradient.new_empty(0)
