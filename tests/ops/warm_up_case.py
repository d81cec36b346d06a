"""Warms up tables and then steps them, with the real compiler of Triton and a driver that launches nothing.

`test_warm_up` runs this as a process of its own, since the driver is one for the process. It prints a line of JSON:
the kernels that each part has compiled.
"""

import json
import sys
from collections import Counter

import torch
from dry_launch import DryLaunches
from kernel_reference import rule_of, update_of
from torch import Tensor

from torchrec_qr.ops import lookup_warm_up
from torchrec_qr.ops.arguments import Batch, DenseGradient, Outcome
from torchrec_qr.ops.backends import triton
from torchrec_qr.ops.description import Description, PartitionLayout, TableLayout

FEATURES = 3


def tables_of(dtype: torch.dtype) -> tuple[Description, list[Tensor]]:
    """A product and a sum, of two features and one; the sum's second partition is replicated, in fp32."""
    qr = (PartitionLayout(16, 1, 40), PartitionLayout(16, 40, 5))
    layouts = [TableLayout("mult", qr, 2, 200), TableLayout("add", qr, 1, 200)]
    weights = [torch.randn(rows, 16) for rows in (40, 5, 40, 5)]
    return Description(layouts, ["a", "b"]), [w.to(dtype) if i < 3 else w for i, w in enumerate(weights)]


def outcomes_of(rule: str, weights: list[Tensor]) -> list[Outcome]:
    return [*(update_of(rule_of(rule), w) for w in weights[:3]), DenseGradient()]


def step(
    tables: Description, weights: list[Tensor], outcomes: list[Outcome], bags: int, pooled: bool, weighted: bool
) -> None:
    groups = FEATURES * (bags if pooled else 1)
    offsets = torch.arange(groups + 1) * 3
    ids = torch.zeros(3 * groups, dtype=torch.int64)
    batch = Batch(ids, offsets, torch.ones(len(ids)) if weighted else None, pooled)
    # Nothing runs, so that what memory holds by chance must not be taken for a verdict: the calls read none here.
    triton._Call.done = lambda self: None  # type: ignore[method-assign]
    out = triton.forward(tables, weights, batch)
    triton.backward(tables, weights, batch, torch.zeros_like(out), outcomes, weighted)


def main(rule: str, dtype: str, pooled: bool, weighted: bool) -> None:
    dry = DryLaunches()
    tables, weights = tables_of(getattr(torch, dtype))
    outcomes = outcomes_of(rule, weights)
    lookup_warm_up.launch_every_kernel(tables, weights, outcomes, pooled, weighted)
    before, dry.compilations = dict(dry.compilations), Counter()
    for bags in (16, 17, 1_000):
        step(tables, weights, outcomes, bags, pooled, weighted)
    print(json.dumps({"warm_up": sorted(before), "steps": sorted(dry.compilations)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "pooled", sys.argv[4] == "weighted")
