"""Metrics of the predictions of all ranks, as if one process had made them all."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from launch.auc import auc


@dataclass(frozen=True)
class Quality:
    """Mean log loss, normalized entropy, AUC and calibration (mean prediction / mean label) of n predictions.

    Normalized entropy is the log loss divided by that of predicting the mean label throughout; a constant
    prediction cannot get below 1. AUC and normalized entropy are NaN if all labels agree.
    """

    samples: int
    logloss: float
    ne: float
    auc: float
    calibration: float
    positives: int = 0

    @property
    def is_guessing(self) -> bool:
        """True if the AUC is within two standard deviations of that of guesses, √((n + 1) / 12 n₊n₋) about 0.5."""
        products = self.positives * (self.samples - self.positives)
        return products > 0 and abs(self.auc - 0.5) < 2 * math.sqrt((self.samples + 1) / (12 * products))


def quality(logits: Tensor, labels: Tensor) -> Quality:
    """Returns the metrics of logits (n,) against labels (n,), in float64.

    Example:
        >>> q = quality(torch.tensor([2.0, -2.0]), torch.tensor([1.0, 0.0]))
        >>> q.auc, round(q.logloss, 4), round(q.ne, 4)
        (1.0, 0.1269, 0.1831)
    """
    n = labels.numel()
    if n == 0:
        return Quality(0, math.nan, math.nan, math.nan, math.nan)
    x, y = logits.double(), labels.double()
    logloss = torch.nn.functional.binary_cross_entropy_with_logits(x, y).item()
    rate = y.mean().item()
    entropy = -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)
    mixed = 0 < rate < 1
    return Quality(
        samples=n,
        logloss=logloss,
        ne=logloss / entropy if mixed else math.nan,
        # Take logits, because large ones tie as predictions.
        auc=auc(y.numpy(), x.numpy()),
        calibration=x.sigmoid().mean().item() / rate if rate else math.inf,
        positives=int(y.sum()),
    )


class Predictions:
    """Collects logits and labels on this rank until `gather` joins those of all ranks.

    Added rows stay on their device, 12 bytes each, until `state` or `gather`. `add` is called every step, and the host
    would wait for the device if it picked rows by their weights, or moved them.

    Args:
        logits (Tensor | None): (n,) from which it goes on, as `state` returned them; default: none.
        labels (Tensor | None): (n,) of the same rows.
    """

    def __init__(self, logits: Tensor | None = None, labels: Tensor | None = None) -> None:
        self._before = torch.empty(2, 0) if logits is None or labels is None else torch.stack([logits, labels])
        self._added: list[Tensor] = []  # (3, B) each: logits, labels, weights

    def add(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Adds logits (B,) and labels (B,) of the rows whose weight is not 0."""
        self._added.append(torch.stack([t.detach().float() for t in (logits, labels, weights)]))

    def state(self) -> tuple[Tensor, Tensor]:
        """Returns this rank's logits and labels so far, on the CPU, from which the constructor goes on."""
        logits, labels = self._own(torch.device("cpu")).unbind()
        return logits, labels

    def gather(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns logits and labels of all ranks, in the order of ranks: the same on each. All ranks must call it."""
        own = self._own(device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor([own.shape[1]], device=device))
        counts = [int(s) for s in sizes]
        padded = torch.nn.functional.pad(own, (0, max(counts) - own.shape[1]))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        logits, labels = torch.cat([p[:, :n] for p, n in zip(parts, counts, strict=True)], dim=1).cpu()
        return logits, labels

    def _own(self, device: torch.device) -> Tensor:
        """Returns (2, n) on ``device``: logits and labels of the rows that count."""
        if not self._added:
            return self._before.to(device)
        added = torch.cat(self._added, dim=1)
        return torch.cat([self._before.to(device), added[:2, added[2] > 0].to(device)], dim=1)
