"""Area under the ROC curve."""

import numpy as np

from launch.data.rows import Array


def auc(labels: Array, scores: Array) -> float:
    """Returns P(score of a positive > score of a negative), ties counting half; NaN without both.

    Example:
        >>> auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.4, 0.8]))
        0.875
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = int((labels > 0.5).sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    return float((ranks[labels > 0.5].sum() - positives * (positives + 1) / 2) / (positives * negatives))
