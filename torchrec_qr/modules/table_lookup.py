"""The lookups of a collection: one of all tables that kernels have, and one for each feature of another table.

PyTorch looks the other tables up, and has nothing to look up several at once.
"""

import json
from collections.abc import Mapping
from itertools import groupby
from typing import cast

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.ids import IdSpace
from torchrec_qr.modules.batch_operator import batch_of_spaces
from torchrec_qr.modules.feature_batch import batch_of
from torchrec_qr.modules.table import Table
from torchrec_qr.modules.tables_as_values import TableParts
from torchrec_qr.ops.arguments import Batch
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.feature_lookup import look_up_features
from torchrec_qr.ops.lookup import look_up

Given = tuple[Description, list[Tensor]]
Tables = nn.ModuleDict | Mapping[str, TableParts]


class TableLookup:
    """One lookup, of consecutive features of the collection's batches.

    Args:
        tables (Tables): the tables of the collection.
        spaces (list[IdSpace]): the id space of each feature, table after table.
        first (int): the number of the first feature.
    """

    def __init__(self, tables: Tables, spaces: list[IdSpace], first: int) -> None:
        self.spaces, self.first = spaces, first
        self._names = list(dict.fromkeys(space.table for space in spaces))
        self._description = self._described(self._tables(tables))
        self._text = json.dumps(spaces)

    def pooled(self, of: Given, features: KeyedJaggedTensor, weighted: bool) -> Tensor:
        """Returns (B, ΣD) fp32 of what `given` returns and a batch whose ids are in range."""
        return look_up(*of, batch_of(features, self.first, len(self.spaces), True, weighted))

    def sequences(self, of: Given, features: KeyedJaggedTensor) -> list[tuple[Tensor, Tensor]]:
        """Returns, as `pooled` has its arguments, (N, D) fp32 of each feature, and its ids (N,)."""
        batch = batch_of(features, self.first, len(self.spaces), False, False)
        outputs = look_up_features(*of, batch)
        starts = batch.starts
        assert starts is not None
        ids = [batch.ids[starts[i] : starts[i + 1]] for i in range(len(self.spaces))]
        return list(zip(outputs, ids, strict=True))

    def by_operators(
        self, of: Given, features: KeyedJaggedTensor, weighted: bool, pooled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `pooled`, or as `sequences` of one feature, by operators alone, of a batch as the collection gets it.

        Returns:
            tuple[Tensor, Tensor, Tensor]: the output (B, ΣD) or (N, D) fp32, the ids (N,) in range, and the lengths of
                their bags.
        """
        tables, weights = of
        keys, ids, bags = "\n".join(features.keys()), features.values(), features.stride()
        own, offsets, lengths, order = batch_of_spaces(
            ids, features.lengths(), weights, keys, bags, self._text, tables.text, weighted, pooled
        )
        id_weights = features.weights().index_select(0, order) if weighted else None
        batch = Batch(own, offsets, id_weights, pooled, None if pooled else [0, own.shape[0]])
        out = look_up(tables, weights, batch) if pooled else look_up_features(tables, weights, batch)[0]
        return out, own, lengths

    def given(self, tables: Tables) -> Given:
        """Returns the description of the tables, and their weights."""
        own = self._tables(tables)
        maps = [table.class_map for table in own if table.class_map is not None]
        # Compare the objects, because a table that moves to another device makes its map anew.
        if any(a is not b for a, b in zip(maps, self._description.class_maps, strict=True)):
            self._description = self._described(own)
        return self._description, [weight for table in own for weight in table.weights()]

    def _tables(self, tables: Tables) -> list[Table | TableParts]:
        return [cast(Table | TableParts, tables[name]) for name in self._names]

    def _described(self, tables: list[Table | TableParts]) -> Description:
        counts = [len(list(group)) for _, group in groupby(self.spaces, key=lambda space: space.table)]
        return Description(
            [t.layout._replace(num_features=n) for t, n in zip(tables, counts, strict=True)],
            self._names,
            [t.class_map for t in tables if t.class_map is not None],
            [space.feature for space in self.spaces],
        )


def lookups_of(tables: Tables, spaces: list[IdSpace]) -> list[TableLookup]:
    """Returns the lookups of a collection.

    Args:
        tables (Tables): its tables.
        spaces (list[IdSpace]): the id space of each feature, table after table.
    """
    with_kernels = {name for name, table in tables.items() if cast(Table | TableParts, table).layout.has_kernels}
    groups = [[space for space in spaces if space.table in with_kernels]]
    groups += [[space] for space in spaces if space.table not in with_kernels]
    lookups: list[TableLookup] = []
    for group in filter(None, groups):
        lookups.append(TableLookup(tables, group, sum(len(lookup.spaces) for lookup in lookups)))
    return lookups
