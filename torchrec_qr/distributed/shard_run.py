"""Consecutive shards of a lookup: all of them in one call of the kernels, or one after the other in PyTorch."""

from collections.abc import Callable
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.distributed.local_shard import LocalShard, ReplicatedPartitions
from torchrec_qr.distributed.optimizer import RowOptimizer
from torchrec_qr.ops.arguments import GRADIENT, Gradients
from torchrec_qr.ops.cpu_structs import HYPER
from torchrec_qr.ops.layout import encode
from torchrec_qr.ops.lookup import Lookup, stepped_lookup
from torchrec_qr.ops.warm_up import warm_up

# Rule, states and numbers of a weight, as the kernels take them.
_Step = tuple[int, list[Tensor], list[float]]
_NO_STEP: _Step = (GRADIENT, [], [0.0] * len(HYPER))


class FeatureRange:
    """Features [first, last) of a batch."""

    def __init__(self, features: KeyedJaggedTensor, first: int, last: int, weighted: bool) -> None:
        self._starts: list[int] = features.offset_per_key()[first : last + 1]
        self._stride = features.stride()
        self._all = features, first, last
        span = slice(self._starts[0], self._starts[-1])
        self.ids = features.values()[span]
        self.weights = features.weights()[span] if weighted else None

    @cached_property
    def bag_offsets(self) -> Tensor:
        """(F·B + 1,), from 0."""
        features, first, last = self._all
        offsets = features.offsets()
        if last - first == len(features.keys()):
            return offsets
        return offsets[first * self._stride : last * self._stride + 1] - self._starts[0]

    @property
    def feature_offsets(self) -> Tensor:
        """(F + 1,), from 0."""
        return torch.tensor([start - self._starts[0] for start in self._starts])

    def feature(self, f: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids (N,), offsets (B + 1,) of bags, and weights (N,) or None of the f-th feature."""
        span = slice(self._starts[f] - self._starts[0], self._starts[f + 1] - self._starts[0])
        bags = self.bag_offsets[f * self._stride : (f + 1) * self._stride + 1]
        return self.ids[span], bags - span.start, None if self.weights is None else self.weights[span]


class ShardRun:
    """Consecutive shards, all of which the kernels have, or none."""

    def __init__(self, shards: list[LocalShard], sequence: bool) -> None:
        self._shards = shards
        self._sequence = sequence
        self.num_features = sum(shard.num_features for shard in shards)
        self.has_kernels = shards[0].layout is not None
        self._layout = encode([shard.layout for shard in shards if shard.layout is not None])

    def in_kernels(self, features: FeatureRange, replicas: ReplicatedPartitions) -> Tensor:
        """Returns (B, ΣD), or for sequences the (N, D) of all features end to end, flat."""
        tables, weights = self._tables(), self._weights(replicas)
        offsets = features.feature_offsets if self._sequence else features.bag_offsets

        def steps() -> Gradients:
            return self._gradients(replicas, RowOptimizer.kernel_step)

        return stepped_lookup(tables, weights, steps, features.ids, offsets, features.weights, not self._sequence)

    def in_pytorch(self, features: FeatureRange, replicas: ReplicatedPartitions) -> list[Tensor]:
        """Returns, per feature, (B, D), or for sequences its (N, D), flat."""
        outputs: list[Tensor] = []
        for shard in self._shards:
            for _ in range(shard.num_features):
                ids, offsets, weights = features.feature(len(outputs))
                if self._sequence:
                    outputs.append(shard.embed(ids, replicas).reshape(-1))
                else:
                    outputs.append(shard.sum(ids, offsets, weights, replicas))
        return outputs

    def warm_up(self, replicas: ReplicatedPartitions, weighted: bool) -> None:
        """Has the kernels of a lookup and of its step compiled, where they run on a GPU."""
        steps = self._gradients(replicas, RowOptimizer.kernel_rule)
        warm_up(self._tables(), self._weights(replicas), steps, not self._sequence, weighted)

    def _tables(self) -> Lookup:
        maps = [shard.class_map for shard in self._shards if shard.class_map is not None]
        return Lookup(self._layout, [shard.name for shard in self._shards], maps)

    def _weights(self, replicas: ReplicatedPartitions) -> list[Tensor]:
        return [weight for shard in self._shards for weight in shard.weights(replicas)]

    def _gradients(self, replicas: ReplicatedPartitions, step_of: Callable[[RowOptimizer, Tensor], _Step]) -> Gradients:
        out = Gradients([], [], [], [])
        for shard in self._shards:
            for step, touched in zip(shard.steps(), shard.touched(replicas), strict=True):
                rule, states, numbers = _NO_STEP if step is None else step_of(*step)
                out.rules.append(rule)
                out.states.extend(states)
                out.hyper.extend(numbers)
                out.touched.append(torch.empty(0, dtype=torch.uint8) if touched is None else touched)
        return out


def runs_of(shards: list[LocalShard], sequence: bool) -> list[ShardRun]:
    """Returns the shards, in order, in as few runs as can be."""
    return [ShardRun(list(run), sequence) for _, run in groupby(shards, key=lambda shard: shard.layout is not None)]
