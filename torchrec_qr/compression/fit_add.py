"""Exact least squares for sums of rows.

The rows W of K partitions minimise Σ_x w_x ‖E[x] - Σ_j W_j[p_j(x)]‖² if they solve the normal equations

    N_i W_i + Σ_{j≠i} C_ij W_j = B_i        for each partition i,

where N_i (|P_i|) is the weight of each class, C_ij (|P_i|, |P_j|) that of each pair of classes, and B_i (|P_i|, D) the
weighted sum of E over each class. The main partition m has most rows, and N_m is diagonal, so that W_m is eliminated:

    (N_i - C_im N_m⁻¹ C_mi) W_i + Σ_{j≠i,m} (C_ij - C_im N_m⁻¹ C_mj) W_j = B_i - C_im N_m⁻¹ B_m.

Conjugate gradients solve what is left, column by column, to the precision of float64. The equations are singular,
because a constant may move from each partition to the main one. The solution is that in which the other partitions have
a weighted mean of 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchrec_qr.compression.full_table import FullTable

# The share of the initial error that may stay, in the norm that conjugate gradients reduce.
_PRECISION = 1e-11
_MOST_STEPS = 5_000


def fit_add(table: FullTable) -> list[Tensor]:
    """Returns the rows W_j (|P_j|, D) in float64 whose sums are nearest to the table.

    Args:
        table (FullTable): the table.

    Raises:
        RuntimeError: the equations are too ill-conditioned to be solved.

    Example:
        >>> from torchrec_qr import QuotientRemainder
        >>> bound = QuotientRemainder(num_collisions=2).bind(4)
        >>> main, other = fit_add(FullTable(torch.tensor([[1.], [2.], [11.], [12.]]), bound))
        >>> (main[[0, 1, 0, 1]] + other[[0, 0, 1, 1]]).T.tolist()
        [[1.0, 2.0, 11.0, 12.0]]
    """
    bound, columns = table.bound, table.rows.shape[1]
    # Their means, not their sums, because sums of weights and of rows are of different sizes.
    means = table.means([slice(0, columns)] * bound.num_partitions)
    others = [j for j in range(bound.num_partitions) if j != bound.main]
    if not others:
        return means
    totals = [table.totals(j) for j in range(bound.num_partitions)]
    shares = {(i, j): table.shares(i, j) for i in others for j in (bound.main, *others) if i != j}
    back = {i: shares[i, bound.main].t() for i in others}

    def main_of(rows: dict[int, Tensor]) -> Tensor:
        """Returns the mean of the other partitions' sum over the ids of each main class."""
        first, *further = (back[i] @ rows[i] for i in others)
        return sum(further, first) / totals[bound.main]

    def equations(rows: dict[int, Tensor]) -> dict[int, Tensor]:
        mains = main_of(rows)
        found = {}
        for i in others:
            found[i] = totals[i] * rows[i] - shares[i, bound.main] @ mains
            for j in others:
                if j != i:
                    found[i] += shares[i, j] @ rows[j]
        return found

    right = {i: totals[i] * means[i] - shares[i, bound.main] @ means[bound.main] for i in others}
    solved = _conjugate_gradients(equations, right, {i: totals[i] for i in others}, table.name)
    rows = [solved.get(j, means[j]) for j in range(bound.num_partitions)]
    rows[bound.main] = means[bound.main] - main_of(solved)
    return rows


def _conjugate_gradients(
    equations: Callable[[dict[int, Tensor]], dict[int, Tensor]],
    right: dict[int, Tensor],
    diagonal: dict[int, Tensor],
    name: str,
) -> dict[int, Tensor]:
    """Returns x with equations(x) = right, each column by itself, preconditioned by ``diagonal``."""
    x = {i: torch.zeros_like(r) for i, r in right.items()}
    residual = _summing_to_0(right, diagonal)
    direction = {i: r / diagonal[i] for i, r in residual.items()}
    error = _dot(residual, direction)
    # Compare with what the right sides would have, because rounding leaves a residual of theirs.
    enough = error * _PRECISION**2
    for _ in range(_MOST_STEPS):
        active = error > enough
        if not bool(active.any()):
            return x
        image = equations(direction)
        step = torch.where(active, error / _dot(direction, image), 0.0)
        for i in x:
            x[i] += step * direction[i]
            residual[i] -= step * image[i]
        residual = _summing_to_0(residual, diagonal)
        scaled = {i: r / diagonal[i] for i, r in residual.items()}
        before, error = error, _dot(residual, scaled)
        turn = torch.where(active, error / before, 0.0)
        direction = {i: scaled[i] + turn * direction[i] for i in x}
    raise RuntimeError(
        f"table {name!r}: the normal equations of its fit are not solved after {_MOST_STEPS:,} steps: the relative "
        f"residual is {float((error / (enough / _PRECISION**2)).max().sqrt()):.1e}, and {_PRECISION:.0e} is required"
    )


def _summing_to_0(residual: dict[int, Tensor], diagonal: dict[int, Tensor]) -> dict[int, Tensor]:
    """Returns the part of residuals that some solution has. Rounding adds another part, on which steps grow."""
    return {i: r - diagonal[i] * (r.sum(0) / diagonal[i].sum()) for i, r in residual.items()}


def _dot(a: dict[int, Tensor], b: dict[int, Tensor]) -> Tensor:
    return torch.stack([(a[i] * b[i]).sum(0) for i in a]).sum(0)
