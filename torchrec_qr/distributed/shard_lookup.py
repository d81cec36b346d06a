"""Consecutive shards that are looked up by one call."""

from itertools import groupby

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.distributed.local_shard import LocalShard, ReplicatedPartitions
from torchrec_qr.distributed.optimizer import RowOptimizer
from torchrec_qr.ops.arguments import Batch, Outcome
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.lookup import stepped_lookup
from torchrec_qr.ops.warm_up import warm_up


class ShardLookup:
    """Consecutive shards of a group: features [first, first + num_features) of its batches."""

    def __init__(self, shards: list[LocalShard], first: int, sequence: bool) -> None:
        self._shards, self._first, self._sequence = shards, first, sequence
        self.num_features = sum(shard.layout.num_features for shard in shards)
        maps = [shard.class_map for shard in shards if shard.class_map is not None]
        self._tables = Description([shard.layout for shard in shards], [shard.name for shard in shards], maps)

    def look_up(self, features: KeyedJaggedTensor, weighted: bool, replicas: ReplicatedPartitions) -> Tensor:
        """Returns (B, ΣD), or for sequences the (N, D) of all features end to end, flat."""

        def outcomes() -> list[Outcome]:
            return [o for shard in self._shards for o in shard.outcomes(replicas, RowOptimizer.begin_step)]

        return stepped_lookup(self._tables, self._weights(replicas), self._batch(features, weighted), outcomes)

    def warm_up(self, weighted: bool, replicas: ReplicatedPartitions) -> None:
        """Has the kernels of a lookup and of its step compiled, if they run on a GPU."""
        outcomes = [o for shard in self._shards for o in shard.outcomes(replicas, RowOptimizer.same_step)]
        warm_up(self._tables, self._weights(replicas), outcomes, not self._sequence, weighted)

    def _weights(self, replicas: ReplicatedPartitions) -> list[Tensor]:
        return [weight for shard in self._shards for weight in shard.weights(replicas)]

    def _batch(self, features: KeyedJaggedTensor, weighted: bool) -> Batch:
        of_all: list[int] = features.offset_per_key()
        first, last, bags = self._first, self._first + self.num_features, features.stride()
        span = slice(of_all[first], of_all[last])
        starts = [start - span.start for start in of_all[first : last + 1]]
        if self._sequence:
            offsets = torch.tensor(starts)
        elif self.num_features == len(features.keys()):
            offsets = features.offsets()
        else:
            offsets = features.offsets()[first * bags : last * bags + 1] - span.start
        weights = features.weights()[span] if weighted else None
        return Batch(features.values()[span], offsets, weights, not self._sequence, starts)


def shard_lookups(shards: list[LocalShard], sequence: bool) -> list[ShardLookup]:
    """Returns lookups of the shards, in order, as few as can be if no table keeps another one from the kernels."""
    out: list[ShardLookup] = []
    first = 0
    for _, group in groupby(shards, key=lambda shard: shard.layout.has_kernels):
        out.append(ShardLookup(list(group), first, sequence))
        first += out[-1].num_features
    return out
