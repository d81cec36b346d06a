"""Area under the ROC curve."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from launch.data.rows import Array

# Rows of which a device makes numbers of 8 bytes at a time, so that memory holds those of a large split.
CHUNK = 1 << 22


def auc(labels: Array, scores: Array) -> float:
    """Returns P(score of a positive > score of a negative), ties counting half; NaN without both.

    Example:
        >>> auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.4, 0.8]))
        0.875
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = int((labels > 0.5).sum())
    return auc_of_ranks(ranks[labels > 0.5].sum(), positives, len(labels) - positives)


def auc_of_ranks(rank_sum: float, positives: int, negatives: int) -> float:
    """Returns the AUC, or NaN without both; ``rank_sum`` is that of the positives, Σ_i rank_i, ties having their mean.

    Example:
        >>> auc_of_ranks(2.5 + 4, positives=2, negatives=2)
        0.875
    """
    if not positives or not negatives:
        return math.nan
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def doubled_rank_sum(labels: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
    """Returns 2 Σ_i rank_i of the positives as one int64, without a wait for a device.

    Args:
        labels (Tensor): (n,) 0 or 1.
        scores (Tensor): (n,); NaN is the largest.
        counts (Tensor): (n,) bool, whether a row counts.

    Example:
        >>> labels, scores = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0.1, 0.4, 0.4, 0.8, 0.2])
        >>> doubled_rank_sum(labels, scores, torch.tensor([True, True, True, True, False]))
        tensor(13)
    """
    in_order, order = scores.nan_to_num(math.inf, math.inf, -math.inf).sort()
    before = F.pad(counts[order].cumsum(0), (1, 0))  # how many of the first i count
    positive = (counts & (labels > 0.5))[order]
    total = before.new_zeros(())
    for scores_of, positive_of in zip(in_order.split(CHUNK), positive.split(CHUNK), strict=True):
        first, end = (torch.searchsorted(in_order, scores_of, right=right) for right in (False, True))
        total += ((before[first] + before[end] + 1) * positive_of).sum()
    return total
