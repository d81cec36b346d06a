"""Runs whose samples share bags, which ranks get once each: TorchRec's variable batch per feature."""

import random
from dataclasses import dataclass

import torch
import torch.distributed as dist
from global_batches import Batch
from parity_model import Run
from ranks import own_device
from torchrec import KeyedJaggedTensor


@dataclass(frozen=True)
class SharedBags(Run):
    """A run of which the reference sees samples, and ranks see each feature's distinct bags with inverse indices."""

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        rng = random.Random(f"bags {step}")
        for i, feature in enumerate(batch.ids):
            # From one bag for all samples to as many as samples.
            sources = [rng.randrange(1 + i * 3 % self.bags) for _ in range(self.bags)]
            batch.ids[feature] = [batch.ids[feature][b] for b in sources]
            batch.weights[feature] = [batch.weights[feature][b] for b in sources]
        return batch

    def own_batch(self, step: int) -> KeyedJaggedTensor:
        own = self.batch(step).part(dist.get_rank(), dist.get_world_size())
        return shared(own, self.weighted, self.int32).to(own_device())


def shared(samples: Batch, weighted: bool = False, int32: bool = False) -> KeyedJaggedTensor:
    """The distinct bags of each feature, the last sample's first, and the inverse indices in another order of keys."""
    distinct, inverse = Batch(), {}
    for feature in samples.ids:
        bags = [(tuple(i), tuple(w)) for i, w in zip(samples.ids[feature], samples.weights[feature], strict=True)]
        unique = list(dict.fromkeys(reversed(bags)))
        inverse[feature] = [unique.index(bag) for bag in bags]
        distinct.ids[feature] = [list(ids) for ids, _ in unique]
        distinct.weights[feature] = [list(weights) for _, weights in unique]
    flat = distinct.kjt(weighted, int32)
    keys = list(reversed(inverse))
    return KeyedJaggedTensor(
        keys=flat.keys(),
        values=flat.values(),
        weights=flat.weights_or_none(),
        lengths=flat.lengths(),
        stride_per_key_per_rank=[[len(bags)] for bags in distinct.ids.values()],
        inverse_indices=(keys, torch.tensor([inverse[key] for key in keys])),
    )
