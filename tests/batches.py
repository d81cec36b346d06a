"""Batches from nested lists."""

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

Bags = list[list[int]]


def batch(per_feature: dict[str, Bags], weights: Tensor | None = None) -> KeyedJaggedTensor:
    """``{"f": [[1, 2], []]}``: feature f of two samples, the first with ids 1 and 2, the second with none."""
    return KeyedJaggedTensor(
        keys=list(per_feature),
        values=torch.tensor([x for bags in per_feature.values() for bag in bags for x in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bags in per_feature.values() for bag in bags], dtype=torch.int64),
        weights=weights,
    )
