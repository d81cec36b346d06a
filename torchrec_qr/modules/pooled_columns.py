"""The output of a pooled collection, from the outputs of its lookups."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_qr.modules.table_lookup import TableLookup
from torchrec_qr.ops.served_operators import ServedTable


class Columns(NamedTuple):
    """Consecutive columns of a lookup's output that follow each other in the collection's output too.

    Args:
        lookup (int): the number of the lookup.
        first (int): the first feature, in the order of the lookups.
        num_features (int): the features.
        width (int): ΣD of the features, which have one D if ``is_mean``.
        is_mean (bool): whether their pooling is MEAN.
    """

    lookup: int
    first: int
    num_features: int
    width: int
    is_mean: bool


def columns_of(tables: Sequence[ServedTable], lookups: Sequence[TableLookup]) -> list[Columns]:
    """Returns the fewest columns that the output of a collection is made of, in order.

    Args:
        tables (Sequence[ServedTable]): the tables of the collection.
        lookups (Sequence[TableLookup]): its lookups.
    """
    of_feature = {
        (space.table, space.feature): (i, lookup.first + position)
        for i, lookup in enumerate(lookups)
        for position, space in enumerate(lookup.spaces)
    }
    features = [
        Columns(*of_feature[t.name, feature], 1, t.layout.dim, t.mean) for t in tables for feature in t.features
    ]
    out = []
    for _, group in groupby(features, key=lambda c: (c.lookup, c.is_mean, c.width if c.is_mean else 0)):
        own = list(group)
        out.append(own[0]._replace(num_features=len(own), width=sum(c.width for c in own)))
    return out


def joined_columns(
    outputs: list[Tensor],
    columns: list[Columns],
    lengths: Tensor | None,
    dims: list[int],
) -> Tensor:
    """Returns the output (B, ΣD) of a collection.

    Args:
        outputs (list[Tensor]): the sums of each lookup, (B, ΣD) of its features.
        columns (list[Columns]): see `columns_of`.
        lengths (Tensor | None): (F·B,) of the bags, in the order of the lookups, if columns are MEAN.
        dims (list[int]): D of each feature of the output.
    """
    pieces = []
    for i, out in enumerate(outputs):
        own = [c for c in columns if c.lookup == i]
        pieces.append(iter(out.split([c.width for c in own], dim=1) if len(own) > 1 else [out]))
    parts = [
        _divided(next(pieces[c.lookup]), c, lengths, len(dims)) if c.is_mean else next(pieces[c.lookup])
        for c in columns
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _divided(sums: Tensor, columns: Columns, lengths: Tensor | None, num_features: int) -> Tensor:
    """Returns the sums of bags (B, f·D) divided by their numbers of ids, or by 1 if a bag is empty."""
    assert lengths is not None
    bags, last = sums.shape[0], columns.first + columns.num_features
    sizes = lengths.view(num_features, bags)[columns.first : last].clamp(min=1)
    of_features = sums.view(bags, columns.num_features, columns.width // columns.num_features)
    return (of_features / sizes.T.unsqueeze(2)).reshape(bags, columns.width)
