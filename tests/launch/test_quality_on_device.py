"""Metrics as a GPU computes them, without a wait for the device, on the CPU: those of the host."""

import math

import pytest
import torch
from torch import Tensor

from launch import auc, metrics
from launch.metrics import quality


def rows(n: int, ties: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, of which about ``ties`` are equal, labels that depend on them, and whether a row counts."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, generator=generator) * 3 * n / ties).round() * ties / n
    labels = (torch.rand(n, generator=generator) < logits.sigmoid()).float()
    return logits, labels, torch.rand(n, generator=generator) < 0.9


CASES = {
    "none": rows(0, 1),
    "none that counts": (torch.ones(3), torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3, dtype=torch.bool)),
    "one": (torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([True])),
    "positives alone": (torch.randn(7), torch.ones(7), torch.ones(7, dtype=torch.bool)),
    "negatives alone": (torch.randn(7), torch.zeros(7), torch.ones(7, dtype=torch.bool)),
    "all tie": (torch.zeros(6), torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0]), torch.ones(6, dtype=torch.bool)),
    "few ties": rows(1000, 2),
    "many ties": rows(1000, 200),
    "signed zeros": (torch.tensor([0.0, -0.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.ones(4) > 0),
    "infinite where none counts": (
        torch.tensor([math.inf, 1.0, 2.0, -math.inf]),
        torch.tensor([1.0, 0.0, 1.0, 0.0]),
        torch.tensor([False, True, True, False]),
    ),
    "NaN": (torch.tensor([math.nan, 1.0, math.nan, -1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.ones(4) > 0),
}


@pytest.mark.parametrize("chunk", [3, 1 << 22])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_device_has_the_means_of_the_host(
    case: tuple[Tensor, Tensor, Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The AUC to the last bit, since it is a quotient of integers; means of float64 but for the order of sums."""
    for module in (auc, metrics):
        monkeypatch.setattr(module, "CHUNK", chunk)
    device, host = metrics._means_on_device(*case), metrics._means_on_host(*case)
    assert (device.samples, device.positives) == (host.samples, host.positives)
    assert device.auc == host.auc or (math.isnan(device.auc) and math.isnan(host.auc))
    for name in ("logloss", "prediction"):
        assert getattr(device, name) == pytest.approx(getattr(host, name), rel=1e-13, nan_ok=True)


def test_rows_of_weight_0_do_not_count() -> None:
    logits, labels, counts = CASES["many ties"]
    assert quality(logits, labels, counts.float()) == quality(logits[counts], labels[counts])


def test_the_auc_counts_pairs() -> None:
    """Counts the pairs of a positive and a negative that are in order, and half of those that tie."""
    logits, labels, counts = CASES["many ties"]
    positive, negative = logits[counts & (labels == 1)], logits[counts & (labels == 0)]
    right = (positive[:, None] > negative).sum() + (positive[:, None] == negative).sum() / 2
    expected = right.item() / (len(positive) * len(negative))
    assert quality(logits, labels, counts.float()).auc == pytest.approx(expected, rel=1e-12)
    assert metrics._means_on_device(logits, labels, counts).auc == pytest.approx(expected, rel=1e-12)
