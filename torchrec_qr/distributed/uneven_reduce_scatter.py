"""A reduce-scatter of pooled embeddings by gloo, for ranks with different numbers of bags.

TorchRec's backward gathers gradients of different sizes, which gloo cannot. Here both ways are an all-to-all.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.dist_data import PooledEmbeddingsAwaitable
from torchrec.distributed.embedding_sharding import BaseEmbeddingDist, EmbeddingShardingContext
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable, NoWait


class UnevenReduceScatter(BaseEmbeddingDist[EmbeddingShardingContext, Tensor, Tensor]):
    """Sums the parts of all ranks, (Σ_r B_r, D) each, and returns this rank's bags, (B, D).

        out[b] = Σ_r local_r[b], for this rank's bags b

    The backward divides gradients by W if TorchRec does. Batches of one size on all ranks are TorchRec's.

    Args:
        even (RwPooledEmbeddingDist): TorchRec's output dist, without codecs.
    """

    def __init__(self, even: RwPooledEmbeddingDist) -> None:
        super().__init__()
        self._even, self._pg = even, even._pg

    def forward(self, local: Tensor, sharding_ctx: EmbeddingShardingContext | None = None) -> Awaitable[Tensor]:
        sizes = [] if sharding_ctx is None else sharding_ctx.batch_size_per_rank
        if len(set(sizes)) <= 1:
            even: Awaitable[Tensor] = self._even(local, sharding_ctx)
            return even
        return PooledEmbeddingsAwaitable(NoWait(_ReduceScatter.apply(local, sizes, self._pg)))


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int], pg: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.pg = sizes, pg
        own, columns = sizes[dist.get_rank(pg)], local.shape[1]
        parts = local.new_empty(len(sizes) * own, columns)
        dist.all_to_all_single(parts, local.contiguous(), [own] * len(sizes), sizes, group=pg)
        return parts.view(len(sizes), own, columns).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        sizes: list[int] = ctx.sizes
        if get_gradient_division():
            gradient = gradient / len(sizes)
        out = gradient.new_empty(sum(sizes), gradient.shape[1])
        sent = gradient.repeat(len(sizes), 1)
        dist.all_to_all_single(out, sent, sizes, [len(gradient)] * len(sizes), group=ctx.pg)
        return out, None, None
