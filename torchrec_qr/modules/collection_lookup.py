"""The lookups of all tables of a collection, from a batch to the values of its output."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_qr.ids import arranged
from torchrec_qr.modules.feature_batch import in_range
from torchrec_qr.modules.pooled_columns import columns_of, joined_columns
from torchrec_qr.modules.table_lookup import TableLookup, Tables, lookups_of
from torchrec_qr.modules.tables_as_values import id_spaces
from torchrec_qr.ops.served_operators import ServedTable
from torchrec_qr.ops.transforms import is_transformed
from torchrec_qr.variable_batches import bags_of_samples, samples_of


class PooledLookup:
    """The lookup of a pooled collection.

    Args:
        described (Sequence[ServedTable]): the tables.
        tables (Tables): the modules, or parts, of the tables.
        weighted (bool): whether to use the batch's weights of ids.
    """

    def __init__(self, described: Sequence[ServedTable], tables: Tables, weighted: bool) -> None:
        spaces = id_spaces(described)
        self._weighted = weighted
        self._lookups = lookups_of(tables, spaces)
        self._spaces = [space for lookup in self._lookups for space in lookup.spaces]
        self._features = [space.feature for space in spaces]
        self._columns = columns_of(described, self._lookups)
        self._divides = any(columns.is_mean for columns in self._columns)
        self._dims = [t.layout.dim for t in described for _ in t.features]

    def __call__(self, tables: Tables, features: KeyedJaggedTensor) -> Tensor:
        """Returns (B, ΣD) fp32, in the order of the collection's output."""
        weighted = self._weighted
        given = [lookup.given(tables) for lookup in self._lookups]
        if _is_compiled(features):
            found = [
                lookup.by_operators(of, features, weighted, True)
                for lookup, of in zip(self._lookups, given, strict=True)
            ]
            lengths = torch.cat([own for _, _, own in found]) if self._divides else None
            return joined_columns([out for out, _, _ in found], self._columns, lengths, self._dims)
        arranged_features = arranged(features, self._spaces, weighted, True)
        bags = bags_of_samples(features, self._features)
        features = in_range(arranged_features, self._spaces, given)
        sums = [lookup.pooled(of, features, weighted) for lookup, of in zip(self._lookups, given, strict=True)]
        # A batch of offsets has no lengths yet.
        lengths = features.lengths() if self._divides else None
        pooled = joined_columns(sums, self._columns, lengths, self._dims)
        return pooled if bags is None else samples_of(pooled, self._dims, bags)


class SequenceLookup:
    """The lookup of a collection without pooling.

    Args:
        described (Sequence[ServedTable]): the tables.
        tables (Tables): the modules, or parts, of the tables.
        outputs (Sequence[str]): the names of the outputs.
        need_indices (bool): whether ``weights()`` of each output has its ids.
    """

    def __init__(
        self, described: Sequence[ServedTable], tables: Tables, outputs: Sequence[str], need_indices: bool
    ) -> None:
        self._in_order = id_spaces(described)
        self._outputs, self._need_indices = list(outputs), need_indices
        self._lookups = lookups_of(tables, self._in_order)
        self._spaces = [space for lookup in self._lookups for space in lookup.spaces]
        self._of_features = [TableLookup(tables, [space], 0) for space in self._in_order]

    def __call__(self, tables: Tables, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Returns (N, D) fp32 of each feature of each table, by the name of its output."""
        if _is_compiled(features):
            of_features = [
                lookup.by_operators(lookup.given(tables), features, False, False) for lookup in self._of_features
            ]
            return {name: self._output(*found) for name, found in zip(self._outputs, of_features, strict=True)}
        features = arranged(features, self._spaces, False, False)
        given = [lookup.given(tables) for lookup in self._lookups]
        features = in_range(features, self._spaces, given)
        lengths = features.lengths().split(features.stride_per_key())
        by_space = {}
        for lookup, of in zip(self._lookups, given, strict=True):
            found = lookup.sequences(of, features)
            for i, (space, (values, ids)) in enumerate(zip(lookup.spaces, found, strict=True)):
                by_space[space] = self._output(values, ids, lengths[lookup.first + i])
        return {name: by_space[space] for name, space in zip(self._outputs, self._in_order, strict=True)}

    def _output(self, values: Tensor, ids: Tensor, lengths: Tensor) -> JaggedTensor:
        return JaggedTensor(values=values, lengths=lengths, weights=ids if self._need_indices else None)


def _is_compiled(features: KeyedJaggedTensor) -> bool:
    """Returns whether a compiler is to see operators alone. They have one number of bags for all features."""
    if not torch.compiler.is_compiling() or is_transformed():
        return False
    return not features.variable_stride_per_key() and features.inverse_indices_or_none() is None
