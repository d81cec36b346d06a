"""A bound on how far a table's results may be from the oracle's, by roundings to the storage type and to fp32.

A sum that is rounded n times on the way is off by at most ((1 + u)^n - 1) · Σ|terms|. The unit roundoff u is 2^-11 for
fp16 and 2^-8 for bf16.
"""

from typing import Any, NamedTuple

import oracle
import torch
from cases import Kind
from optimizer_reference import gradient_of
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType

from torchrec_qr.modules.table import CompositionalTable
from torchrec_qr.ops.backends import cpu

# The allowance for fp32 is relative to the value, plus to a tenth of the largest one, or to 0.3 if that is more: terms
# of order one cancel (`cases.randomize`).
_FP32 = 1e-5


class Allowances(NamedTuple):
    """Bounds on how much storage roundings move each value of the output and of the gradients."""

    output: Tensor | float
    partitions: list[Tensor]
    weights: Tensor | float


def allowances(
    config: Any,
    kind: Kind,
    table: CompositionalTable,
    bags: list[list[int]],
    weights: Tensor | None,
    out_gradient: Tensor,
    pooled: bool = True,
) -> Allowances:
    """Returns the allowances of a batch, whose ids' weights and output's gradient are positive.

    The kernels round only the gradients that they return. PyTorch's lookups round their inputs and outputs. They also
    round the gradient of a row once per id that selects it, because they add up in the storage type.
    """
    by_kernels = config.operation != "path" and cpu.available()
    pooled_lookups = not by_kernels and pooled and config.operation in ("add", "concat")
    weighted = weights is not None
    ids = [x for bag in bags for x in bag]
    stored = table.weights()
    rows = torch.tensor([kind.rows_of(x) for x in ids], dtype=torch.int64).view(-1, len(stored))
    selected = [w.detach().double()[r] for w, r in zip(stored, rows.unbind(1), strict=True)]
    terms = _Terms(config, bags, weights, out_gradient, pooled)

    of_partitions = []
    for j, (weight, of_ids) in enumerate(zip(stored, terms.of(selected).rows, strict=True)):
        summed = torch.zeros(weight.shape, dtype=torch.float64).index_add(0, rows[:, j], of_ids)
        if by_kernels or (config.operation == "path" and j > 0):
            of_partitions.append(_unit_roundoff(weight) * summed.abs())
            continue
        sizes = torch.zeros_like(summed).index_add(0, rows[:, j], of_ids.abs())
        # Each gradient, and each sum but the first, which adds to 0; a pooled lookup also weight and product.
        uses = rows[:, j].bincount(minlength=len(weight)).unsqueeze(1)
        roundings = uses + 2 if pooled_lookups and weighted else uses
        of_partitions.append(((1 + _unit_roundoff(weight)) ** roundings - 1) * sizes)
    if not pooled_lookups:
        return Allowances(0.0, of_partitions, 0.0)
    u = max(map(_unit_roundoff, stored))
    sizes_of = terms.of([s.abs() for s in selected])
    # The output of each lookup, and its weights; the gradient that comes in, and that of the weights that goes out.
    return Allowances(
        ((1 + u) ** (1 + weighted) - 1) * sizes_of.output, of_partitions, ((1 + u) ** 2 - 1) * sizes_of.weights
    )


class _Results(NamedTuple):
    """Output, the gradient (N, D_j) of the rows that each id selects, and that of the ids' weights."""

    output: Tensor
    rows: list[Tensor]
    weights: Tensor


class _Terms:
    """A batch of which each id has rows of its own: what it adds to their gradients stays apart."""

    def __init__(
        self, config: Any, bags: list[list[int]], weights: Tensor | None, out_gradient: Tensor, pooled: bool
    ) -> None:
        self._config, self._out_gradient = config, out_gradient.double()
        self._pooling = "mean" if pooled and config.pooling == PoolingType.MEAN else "sum"
        sizes = [len(bag) for bag in bags]
        n = sum(sizes)
        self._bags = [part.tolist() for part in torch.arange(n).split(sizes)]
        self._weights = torch.ones(n) if weights is None else weights.detach()
        self._sizes = sizes

    def of(self, selected: list[Tensor]) -> _Results:
        config, rows = self._config, [s.clone().requires_grad_() for s in selected]
        weights = self._weights.double().requires_grad_()
        table = oracle.OracleTable(
            lambda n: (n,) * len(rows),
            rows,
            config.operation,
            self._pooling,
            config.path_hidden,
            config.path_activation,
        )
        output = table.pool(self._bags, list(weights.split(self._sizes))) if len(weights) else self._out_gradient * 0
        if output.requires_grad:
            output.backward(self._out_gradient)
        return _Results(output.detach(), [gradient_of(r) for r in rows], gradient_of(weights))


def assert_agrees(actual: Tensor | None, expected: Tensor, what: str, allowance: Tensor | float = 0.0) -> None:
    """Asserts that |actual - expected| is at most ``allowance``, and what fp32 may bring about, everywhere."""
    assert actual is not None, what
    assert actual.shape == expected.shape, what
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    allowed = allowance + _FP32 * (expected.abs() + max(largest / 10, 0.3))
    off = (actual.double() - expected).abs()
    within = off <= allowed
    if not within.all():
        worst = (off / allowed).nan_to_num(nan=torch.inf).argmax()
        raise AssertionError(
            f"{what}: {int((~within).sum())} of {off.numel()} values differ by more than is allowed; worst, number "
            f"{int(worst)}: {actual.flatten()[worst]:.7g}, expected {expected.flatten()[worst]:.7g} ± "
            f"{allowed.flatten()[worst]:.2g}"
        )


def _unit_roundoff(weight: Tensor) -> float:
    """u of a storage type; 0 of fp32, whose roundings are those of any computation."""
    return 0.0 if weight.dtype == torch.float32 else torch.finfo(weight.dtype).eps / 2
