"""Alternating least squares for products of rows.

With all other partitions held, the rows of partition j that minimise Σ_x w_x (E[x] - Π_i W_i[p_i(x)])², column by
column, are

    W_j[c] = Σ_{x in c} w_x E[x] o[x]  /  Σ_{x in c} w_x o[x]²,    o[x] = Π_{i≠j} W_i[p_i(x)].

A sweep does this for every partition, the main one last. No sweep makes the error larger. The best product cannot be
computed exactly, so that the sweeps end when they gain little.
"""

import torch
from torch import Tensor

from torchrec_qr.compression.full_table import FullTable

# The share of the squared error that a sweep must gain. A sweep that gains less is the last one.
_LEAST_GAIN = 1e-3
_MOST_SWEEPS = 20
# Multiply in fp32 and add in float64, because multiplications take most of the time.
_BLOCK_TYPE = torch.float32


def fit_mult(table: FullTable) -> list[Tensor]:
    """Returns rows W_j (|P_j|, D) in float64 whose products are near the table.

    Each column takes the better of two starts. In one, all partitions except the main one are 1, and in the other they
    are random. The second one reaches columns whose ids cancel within each main class. The rows of all partitions
    except the main one have a mean square of 1 in each column, because a factor may move between partitions.

    Args:
        table (FullTable): the table.

    Example:
        >>> from torchrec_qr import QuotientRemainder
        >>> bound = QuotientRemainder(num_collisions=2).bind(4)
        >>> main, other = fit_mult(FullTable(torch.tensor([[1.], [2.], [-3.], [-6.]]), bound))
        >>> [round(x, 6) for x in (main[[0, 1, 0, 1]] * other[[0, 0, 1, 1]]).flatten().tolist()]
        [1.0, 2.0, -3.0, -6.0]
    """
    bound, columns = table.bound, table.rows.shape[1]
    energy = float(sum(block.energy(block.rows).sum() for block in table.blocks()))
    means = table.means([slice(0, columns)] * bound.num_partitions)[bound.main]
    if bound.num_partitions == 1:
        return [means]
    first, first_explained = _swept(table, _start(table, means, None))
    second, second_explained = _swept(table, _start(table, means, torch.Generator().manual_seed(0)))
    better = second_explained > first_explained
    rows = [torch.where(better, b, a) for a, b in zip(first, second, strict=True)]
    error = energy - float(torch.where(better, second_explained, first_explained).sum())
    for _ in range(_MOST_SWEEPS):
        rows, explained = _swept(table, rows)
        before, error = error, energy - float(explained.sum())
        if before - error <= _LEAST_GAIN * before:
            break
    for j in range(bound.num_partitions):
        if j != bound.main:
            scale = rows[j].square().mean(0).sqrt()
            scale = scale.where(scale > 0, 1.0)
            rows[j] = rows[j] / scale
            rows[bound.main] = rows[bound.main] * scale
    return rows


def _start(table: FullTable, means: Tensor, generator: torch.Generator | None) -> list[Tensor]:
    rows = []
    for size in table.bound.sizes:
        drawn = torch.ones(size, means.shape[1], dtype=torch.float64, device="cpu")
        if generator is not None:
            drawn.normal_(generator=generator)
        rows.append(drawn.to(means.device))
    if generator is None:
        rows[table.bound.main] = means
    return rows


def _swept(table: FullTable, rows: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Returns the rows after a sweep, and the part of Σ w E² that they explain in each column."""
    rows, main = list(rows), table.bound.main
    explained = rows[main].new_zeros(())
    for j in [*(j for j in range(len(rows)) if j != main), main]:
        sums = table.zeros(j, 2 * table.rows.shape[1])
        factors = {i: row.to(_BLOCK_TYPE) for i, row in enumerate(rows) if i != j}
        for block in table.blocks(_BLOCK_TYPE):
            others = _product([table.row_of_each(row, i, block) for i, row in factors.items()])
            table.add(sums, torch.cat([others * block.rows, others * others], dim=1), block, j)
        products, squares = sums.chunk(2, dim=1)
        # Keep a row if all products of the others are 0, because any row fits as well.
        rows[j] = torch.where(squares > 0, products / squares, rows[j])
        explained = (products * rows[j]).sum(0)
    return rows, explained


def _product(factors: list[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product
