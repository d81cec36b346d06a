"""The scores u · e(x) of consecutive ids, block after block, without the S × D table.

Legend: u (B, D) are the user vectors, and e(x) = compose_j( W_j[p_j(x)] ) is the full row of id x.
"""

import math
from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_qr.inference.full_rows import Collection, materialized_blocks, table_of
from torchrec_qr.inference.id_digits import Digit, IdGrid, digits_of, id_grid, number_of_lower
from torchrec_qr.modules.table import Table

# So many scores at a time, because 4 MiB stay in a processor's cache.
_AT_ONCE = 1 << 20
# A product of so many scores takes much longer than the call.
_WORTH_A_CALL = 1 << 18

ScoreBlock = tuple[int, Tensor]
Place = Callable[[int, int], Tensor | None]


def score_blocks(
    collection: Collection,
    table: str,
    users: Tensor,
    num_ids: int,
    into: Tensor | None = None,
    at_once: int = _AT_ONCE,
) -> Iterator[ScoreBlock]:
    """Yields the first id and the scores (B, n) fp32 of consecutive ids, in the order of ids.

    - Sums of rows (``add``, ``concat``) are u · e(x) = Σ_j u_j · W_j[p_j(x)], of K products (B × |P_j|). Under
      ``concat`` u_j are the columns of partition j, and u otherwise.
    - Products of two rows (``mult``) are u · (w ⊙ v) = (u ⊙ w) · v. If ids share the row w of one partition, one
      product with the rows v of the other has their scores.
    - Other tables are scored by blocks of full rows.

    Args:
        collection (Collection): the collection.
        table (str): one of its tables.
        users (Tensor): (B, D) fp32 on the collection's device.
        num_ids (int): S.
        into (Tensor | None): (B, S) fp32, memory for the scores. The blocks are then parts of it.
        at_once (int): about the most scores of a block, and the most scalars of its rows.
    """
    own, _ = table_of(collection, table)
    layout, count = own.layout, max(1, len(users))
    digits = digits_of(layout, num_ids)
    of_scores, of_rows = max(1, at_once // count), max(1, at_once // max(count, layout.dim))

    def place(first: int, count: int) -> Tensor | None:
        """Returns the memory for the scores of so many ids, or None if there is none."""
        return None if into is None or first + count > num_ids else into[:, first : first + count]

    # Take the only partition for a product, because a sum begins with the scores of all rows, which may be S.
    is_single, is_sum = len(layout.partitions) == 1, layout.operation in ("add", "concat")
    if digits is not None and (is_single or layout.operation == "mult"):
        blocks = _products_on_grid(own, users, _grid_of_products(own, digits, count, at_once, into is not None), place)
    elif digits is not None and is_sum:
        blocks = _sums_on_grid(own, users, _grid_of_sums(digits, of_scores), place)
    elif is_single or is_sum:
        blocks = _sums(own, users, num_ids, of_scores)
    else:
        blocks = _of_full_rows(collection, table, users, of_rows, place)
    for first, scores in blocks:
        if first >= num_ids:
            return
        scores = scores[:, : num_ids - first]
        if into is not None:
            target = into[:, first : first + scores.shape[1]]
            if scores.data_ptr() != target.data_ptr():
                # Let each user's scores be contiguous first, because writes that are S floats apart miss the caches.
                target.copy_(scores.contiguous())
            scores = target
        yield first, scores


def _grid_of_sums(digits: list[Digit], most: int) -> IdGrid:
    num_lower = number_of_lower(digits, most, most)
    return id_grid(digits, num_lower, most // math.prod(digit.size for digit in digits[:num_lower]))


def _grid_of_products(table: Table, digits: list[Digit], count: int, at_once: int, has_place: bool) -> IdGrid:
    """Returns a grid of which neither scores nor copies of rows in fp32 exceed ``at_once`` by much."""
    dim = table.layout.dim
    of_scores, of_rows = at_once // count, at_once // max(count, dim)
    # Rows in fp32 are no copies, unless rows of several digits are multiplied.
    are_copied = any(weight.dtype != torch.float32 for weight in table.weights())
    num_lower = number_of_lower(digits, of_rows if are_copied else of_scores, of_rows)
    period = math.prod(digit.size for digit in digits[:num_lower])
    if not num_lower and not are_copied:
        # Write all scores of a place by one product, because it needs no other memory.
        most_rows = digits[0].size if has_place else of_scores
    elif not num_lower:
        most_rows = of_rows
    elif period < count:
        most_rows = of_rows // period
    elif has_place and count * period >= _WORTH_A_CALL:
        # Write the scores of one row by a product of its own, because no copy follows.
        most_rows = 1
    else:
        most_rows = min(of_scores // period, at_once // (count * dim))
    return id_grid(digits, num_lower, max(1, most_rows))


def _sums_on_grid(table: Table, users: Tensor, grid: IdGrid, place: Place) -> Iterator[ScoreBlock]:
    # Let the longer of the two inner dimensions of a block be contiguous, if the block is not written to a place.
    by_user = place(0, 0) is not None or not grid.lower or grid.period >= len(users)
    scores = _scores_of_rows(table, users, by_user)
    lower = None
    for digit in grid.lower:
        of_digit = scores[digit.partition][:, : digit.size]
        lower = of_digit if lower is None else _outer_sum(of_digit, lower)
    for block in grid.blocks():
        fixed = [scores[digit.partition][:, row, None] for digit, row in zip(grid.upper, block.upper, strict=True)]
        upper = scores[grid.split.partition][:, block.rows]
        if lower is None:
            out = place(block.first, upper.shape[1])
            yield block.first, torch.add(upper, sum(fixed[1:], start=fixed[0]), out=out)
        else:
            out = place(block.first, upper.shape[1] * lower.shape[1])
            yield block.first, _outer_sum(sum(fixed, start=upper), lower, out)


def _outer_sum(upper: Tensor, lower: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns (B, g·P) of (B, g) and (B, P), in ``out`` or in the order of memory that the two have."""
    shape = (upper.shape[1], lower.shape[1])
    pairs = None if out is None else out.unflatten(1, shape)
    return torch.add(upper.unsqueeze(2), lower.unsqueeze(1), out=pairs).flatten(1)


def _sums(table: Table, users: Tensor, num_ids: int, most: int) -> Iterator[ScoreBlock]:
    """Yields blocks of ``most`` ids, whose rows are looked up in a table that has a column for each user."""
    scores = [of.T for of in _scores_of_rows(table, users, by_user=False)]
    joined, starts = torch.cat(scores), [0]
    for of in scores[:-1]:
        starts.append(starts[-1] + len(of))
    for first in range(0, num_ids, most):
        ids = torch.arange(first, min(first + most, num_ids), device=users.device)
        rows = [
            partition.rows_of(ids, table.class_map) + start
            for partition, start in zip(table.layout.partitions, starts, strict=True)
        ]
        yield first, F.embedding_bag(torch.stack(rows, dim=1), joined, mode="sum").T


def _scores_of_rows(table: Table, users: Tensor, by_user: bool) -> list[Tensor]:
    """Returns (B, |P_j|) for each partition: u_j · W_j[r]. The scores of a user, or else of a row, are contiguous."""
    weights, layout = table.weights(), table.layout
    columns = users.split(layout.widths, dim=1) if layout.operation == "concat" else [users] * len(weights)
    found = []
    for weight, own in zip(weights, columns, strict=True):
        shape = (len(users), len(weight)) if by_user else (len(weight), len(users))
        out = torch.empty(shape, device=users.device)
        found.append(out if by_user else out.T)
        step = max(1, _AT_ONCE // weight.shape[1])
        for rows, scores in zip(weight.split(step), found[-1].split(step, dim=1), strict=True):
            torch.mm(own, rows.float().T, out=scores)
    return found


def _products_on_grid(table: Table, users: Tensor, grid: IdGrid, place: Place) -> Iterator[ScoreBlock]:
    weights = table.weights()
    lower = None
    for digit in grid.lower:
        rows = weights[digit.partition][: digit.size].float()
        lower = rows if lower is None else _outer_product(rows, lower)
    for block in grid.blocks():
        rows_of_all = [weights[digit.partition][row] for digit, row in zip(grid.upper, block.upper, strict=True)]
        scaled = reduce(torch.mul, (row.float() for row in rows_of_all), users)
        upper = weights[grid.split.partition][block.rows].float()
        if lower is None:
            scores = torch.mm(scaled, upper.T, out=place(block.first, len(upper)))
        elif len(lower) < len(users):
            rows = _outer_product(upper, lower)
            scores = torch.mm(scaled, rows.T, out=place(block.first, len(rows)))
        else:
            out = place(block.first, len(lower)) if len(upper) == 1 else None
            scores = torch.mm(_outer_product(scaled, upper), lower.T, out=out)
            scores = scores.view(len(users), len(upper) * len(lower))
        yield block.first, scores


def _outer_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns (N·M, D) of (N, D) and (M, D): a_n ⊙ b_m, the last of which changes fastest."""
    return (a.unsqueeze(1) * b).flatten(0, 1)


def _of_full_rows(collection: Collection, table: str, users: Tensor, most: int, place: Place) -> Iterator[ScoreBlock]:
    first = 0
    for rows in materialized_blocks(collection, table, most):
        yield first, torch.mm(users, rows.T, out=place(first, len(rows)))
        first += len(rows)
