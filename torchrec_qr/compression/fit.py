"""The partitions whose embeddings are nearest to a full table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from torchrec_qr.compression.fit_add import fit_add
from torchrec_qr.compression.fit_mult import fit_mult
from torchrec_qr.compression.full_table import FullTable
from torchrec_qr.configs import DIM_MULTIPLE, CompositionalConfig

_LEAST_SCALARS = 1 << 20


@dataclass(frozen=True)
class Fit:
    """Partitions fitted to a full table E, with embeddings Ê.

    Args:
        rows (list[Tensor]): (|P_j|, D_j) of each partition, in its type.
        error (float): ‖E - Ê‖ / ‖E‖ in the Frobenius norm, of the stored rows.
        weighted_error (float | None): the same of √w_x times each row, if there are weights w_x.
    """

    rows: list[Tensor]
    error: float
    weighted_error: float | None


@torch.no_grad()
def fitted(config: CompositionalConfig, full: Tensor, frequencies: Tensor | None = None) -> Fit:
    """Returns the partitions whose embeddings are nearest to the rows of a full table.

    They minimise Σ_x w_x ‖E[x] - compose_j(W_j[p_j(x)])‖²: exactly under ``add``, ``concat`` and with one partition,
    and by alternating least squares under ``mult``. The table is read in blocks of rows.

    Args:
        config (CompositionalConfig): the table.
        full (Tensor): E (S, D), of any floating type, on any device.
        frequencies (Tensor | None): w (S,), at least 0. Ids of weight 0 decide only what no other id does.

    Raises:
        NotImplementedError: the operation is ``path``, whose MLPs no least squares finds.
        ValueError: ``full`` or ``frequencies`` have another shape, or values that are not allowed.

    Example:
        >>> from torchrec_qr import CompositionalEmbeddingConfig, QuotientRemainder
        >>> config = CompositionalEmbeddingConfig(name="t", num_embeddings=4, embedding_dim=4, feature_names=["f"],
        ...     partitions=QuotientRemainder(num_collisions=2), operation="add")
        >>> found = fitted(config, torch.tensor([[1.], [2.], [11.], [12.]]).expand(4, 4))
        >>> [tuple(rows.shape) for rows in found.rows], round(found.error, 6)
        ([(2, 4), (2, 4)], 0.0)
    """
    _check(config, full, frequencies)
    table, shapes = FullTable(full, config.bound_partitions, frequencies, config.name), config.partition_shapes
    stored = [torch.empty(rows, columns, dtype=dtype, device=full.device) for rows, columns, dtype in shapes]
    if config.operation == "concat":
        ends = list(accumulate(config.partition_columns, initial=0))
        _store(stored, table.means([slice(*columns) for columns in pairwise(ends)]))
    else:
        for columns in _column_groups(config):
            rows = (fit_mult if config.operation == "mult" else fit_add)(table.of_columns(columns))
            _store([weight[:, columns] for weight in stored], rows)
    if not all(bool(weight.isfinite().all()) for weight in stored):
        raise ValueError(
            f"table {config.name!r}: values up to {float(full.abs().max())} overflow while partitions are fitted; "
            "allowed: a table with smaller values, such as up to 1e15"
        )
    return Fit(stored, *_errors(config, table, stored))


def _column_groups(config: CompositionalConfig) -> list[slice]:
    """Returns groups of columns, which are fitted one after the other, so that the sums of a group take little memory.

    The sums of the main partition are several tensors of float64. For each of them a group has at most a 16th of the
    table's scalars.
    """
    main = max(config.bound_partitions.sizes)
    scalars = max(_LEAST_SCALARS, config.num_embeddings * config.embedding_dim // 16)
    step = max(DIM_MULTIPLE, scalars // main)
    return [slice(first, first + step) for first in range(0, config.embedding_dim, step)]


def _store(stored: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    for weight, fitted in zip(stored, rows, strict=True):
        weight.copy_(fitted)


def _errors(config: CompositionalConfig, table: FullTable, stored: list[Tensor]) -> tuple[float, float | None]:
    wrong = total = weighted_wrong = weighted_total = 0.0
    for block in table.blocks():
        parts = [table.row_of_each(rows, j, block).double() for j, rows in enumerate(stored)]
        if config.operation == "concat":
            embeddings = torch.cat(parts, dim=1)
        else:
            embeddings = parts[0]
            for part in parts[1:]:
                embeddings = embeddings * part if config.operation == "mult" else embeddings + part
        difference = block.rows - embeddings
        wrong, total = wrong + float(difference.square().sum()), total + float(block.rows.square().sum())
        weighted_wrong += float(block.energy(difference).sum())
        weighted_total += float(block.energy(block.rows).sum())
    return _ratio(wrong, total), None if table.weights is None else _ratio(weighted_wrong, weighted_total)


def _ratio(wrong: float, total: float) -> float:
    return math.sqrt(wrong / total) if total else 0.0


def _check(config: CompositionalConfig, full: Tensor, frequencies: Tensor | None) -> None:
    name, shape = config.name, (config.num_embeddings, config.embedding_dim)
    if config.operation == "path":
        raise NotImplementedError(
            f"table {name!r}: operation='path' cannot be fitted to a full table, because it is no linear or "
            "multilinear function of its rows; allowed: 'mult', 'add', 'concat'"
        )
    if tuple(full.shape) != shape:
        raise ValueError(f"table {name!r}: the full table has shape {tuple(full.shape)}; allowed: {shape}")
    if full.device.type == "meta":
        raise ValueError(f"table {name!r}: the full table is on the meta device; allowed: one that has values")
    _check_finite(f"table {name!r}: the full table has", full)
    if frequencies is None:
        return
    owner = f"table {name!r}: frequencies"
    if not isinstance(frequencies, Tensor):
        raise TypeError(f"{owner} are a {type(frequencies).__name__}; allowed: a tensor of shape {shape[:1]}")
    if tuple(frequencies.shape) != shape[:1]:
        raise ValueError(f"{owner} have shape {tuple(frequencies.shape)}; allowed: {shape[:1]}")
    _check_finite(f"{owner} have", frequencies)
    least, total = float(frequencies.min()), float(frequencies.sum())
    if least < 0 or total == 0:
        raise ValueError(f"{owner} have the least value {least} and the sum {total}; allowed: at least 0, not all 0")


def _check_finite(owner: str, values: Tensor) -> None:
    low, high = torch.aminmax(values)
    if not (bool(low.isfinite()) and bool(high.isfinite())):
        finite = values.isfinite().reshape(len(values), -1).all(1)
        raise ValueError(f"{owner} a value that is not finite, first at id {int(finite.long().argmin())}")
