"""Metrics of the predictions of all ranks, as if one process had made them all."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from launch.auc import CHUNK, auc, auc_of_ranks, doubled_rank_sum


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


class _Means(NamedTuple):
    """The numbers of samples and of positives, means over all samples, and the AUC."""

    samples: int
    positives: int
    logloss: float
    prediction: float
    auc: float


def quality(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Quality:
    """Returns the metrics of logits (n,) against labels (n,), in float64; rows whose weight is 0 do not count.

    A GPU computes them without the host, which then waits once for all. They are the CPU's but for the order of sums.

    Example:
        >>> q = quality(torch.tensor([2.0, -2.0]), torch.tensor([1.0, 0.0]))
        >>> q.auc, round(q.logloss, 4), round(q.ne, 4)
        (1.0, 0.1269, 0.1831)
    """
    counts = torch.ones_like(labels, dtype=torch.bool) if weights is None else weights > 0
    of = (_means_on_host if labels.device.type == "cpu" else _means_on_device)(logits, labels, counts)
    if of.samples == 0:
        return Quality(0, math.nan, math.nan, math.nan, math.nan)
    rate = of.positives / of.samples
    entropy = -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)
    return Quality(
        samples=of.samples,
        logloss=of.logloss,
        ne=of.logloss / entropy if 0 < rate < 1 else math.nan,
        auc=of.auc,
        calibration=of.prediction / rate if rate else math.inf,
        positives=of.positives,
    )


def _means_on_host(logits: Tensor, labels: Tensor, counts: Tensor) -> _Means:
    x, y = logits[counts].double(), labels[counts].double()
    loss = binary_cross_entropy_with_logits(x, y).item()
    # Take logits, because large ones tie as predictions.
    return _Means(y.numel(), int(y.sum()), loss, x.sigmoid().mean().item(), auc(y.numpy(), x.numpy()))


def _means_on_device(logits: Tensor, labels: Tensor, counts: Tensor) -> _Means:
    sums = torch.zeros(4, dtype=torch.float64, device=labels.device)
    for x, y, counted in zip(logits.split(CHUNK), labels.split(CHUNK), counts.split(CHUNK), strict=True):
        x, y, w = x.double().where(counted, 0), y.double().where(counted, 0), counted.double()
        loss = binary_cross_entropy_with_logits(x, y, w, reduction="sum")
        sums += torch.stack([w.sum(), y.sum(), loss, (x.sigmoid() * w).sum()])
    ranks = doubled_rank_sum(labels, logits, counts).double().unsqueeze(0)
    samples, positives, loss, prediction, doubled = torch.cat([sums, ranks]).tolist()
    if not samples:
        return _Means(0, 0, math.nan, math.nan, math.nan)
    area = auc_of_ranks(doubled / 2, int(positives), int(samples - positives))
    return _Means(int(samples), int(positives), loss / samples, prediction / samples, area)


class Predictions:
    """Collects logits and labels on this rank until `gather` joins those of all ranks.

    Added rows stay on their device, 12 bytes each, until `state`. `add` is called every step, and the host would wait
    for the device if it picked rows by their weights, or moved them.

    Args:
        logits (Tensor | None): (n,) from which it goes on, as `state` returned them; default: none.
        labels (Tensor | None): (n,) of the same rows.
    """

    def __init__(self, logits: Tensor | None = None, labels: Tensor | None = None) -> None:
        # (3, B) each: logits, labels, weights
        self._added = (
            [] if logits is None or labels is None else [torch.stack([logits, labels, torch.ones_like(labels)])]
        )

    def add(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Adds logits (B,) and labels (B,) of the rows whose weight is not 0."""
        self._added.append(torch.stack([t.detach().float() for t in (logits, labels, weights)]))

    def state(self) -> tuple[Tensor, Tensor]:
        """Returns this rank's logits and labels so far, on the CPU, from which the constructor goes on."""
        logits, labels, weights = self._own(torch.device("cpu"))
        return logits[weights > 0], labels[weights > 0]

    def gather(self, device: torch.device, hosts: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits, labels and weights of all ranks, as `quality` takes them, in the order of ranks.

        All ranks must call it. They get the same, on ``device``, and no host waits for it.

        Args:
            device (torch.device): of this rank.
            hosts (ProcessGroup | None): of all ranks, on the hosts; default: the default group, if that is.
        """
        own, world_size = self._own(device), dist.get_world_size()
        sizes = torch.zeros(world_size, dtype=torch.int64)
        dist.all_gather_into_tensor(sizes, torch.tensor([own.shape[1]]), group=hosts)
        # Rows that fill a rank's up have weight 0.
        padded = pad(own, (0, max(sizes.tolist()) - own.shape[1]))
        parts = padded.new_empty(world_size * 3, padded.shape[1])
        dist.all_gather_into_tensor(parts, padded)
        logits, labels, weights = parts.view(world_size, 3, -1).transpose(0, 1).reshape(3, -1)
        return logits, labels, weights

    def _own(self, device: torch.device) -> Tensor:
        """Returns (3, n) on ``device``: logits, labels and weights of this rank."""
        return torch.cat([torch.empty(3, 0, device=device), *(added.to(device) for added in self._added)], dim=1)
