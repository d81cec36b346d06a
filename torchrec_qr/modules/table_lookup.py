"""The lookups of a collection: one of all tables that kernels have, and one for each feature of another table.

PyTorch looks the other tables up, and has nothing to look up several at once.
"""

from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.ids import IdSpace
from torchrec_qr.modules.feature_batch import batch_of
from torchrec_qr.modules.table import Table
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.feature_lookup import look_up_features
from torchrec_qr.ops.lookup import look_up

Given = tuple[Description, list[Tensor]]


class TableLookup:
    """One lookup, of consecutive features of the collection's batches.

    Args:
        tables (nn.ModuleDict): the tables of the collection.
        spaces (list[IdSpace]): the id space of each feature, table after table.
        first (int): the number of the first feature.
    """

    def __init__(self, tables: nn.ModuleDict, spaces: list[IdSpace], first: int) -> None:
        self.spaces, self.first = spaces, first
        self._names = list(dict.fromkeys(space.table for space in spaces))
        self._description = self._described(self._tables(tables))

    def pooled(self, of: Given, features: KeyedJaggedTensor, weighted: bool) -> Tensor:
        """Returns (B, ΣD) fp32 of what `given` returns and a batch whose ids are in range."""
        return look_up(*of, batch_of(features, self.first, len(self.spaces), True, weighted))

    def sequences(self, of: Given, features: KeyedJaggedTensor) -> list[tuple[Tensor, Tensor]]:
        """Returns, as `pooled` has its arguments, (N, D) fp32 of each feature, and its ids (N,)."""
        batch = batch_of(features, self.first, len(self.spaces), False, False)
        outputs = look_up_features(*of, batch)
        starts = batch.starts
        assert starts is not None
        # Count the features of the lookup, because `torch.fx` does not know how many outputs there are.
        return [(outputs[i], batch.ids[starts[i] : starts[i + 1]]) for i in range(len(self.spaces))]

    def given(self, tables: nn.ModuleDict) -> Given:
        """Returns the description of the tables, and their weights."""
        own = self._tables(tables)
        maps = [table.class_map for table in own if table.class_map is not None]
        # Compare the objects, because a table that moves to another device makes its map anew.
        if any(a is not b for a, b in zip(maps, self._description.class_maps, strict=True)):
            self._description = self._described(own)
        return self._description, [weight for table in own for weight in table.weights()]

    def _tables(self, tables: nn.ModuleDict) -> list[Table]:
        return [cast(Table, tables[name]) for name in self._names]

    def _described(self, tables: list[Table]) -> Description:
        counts = [len(list(group)) for _, group in groupby(self.spaces, key=lambda space: space.table)]
        return Description(
            [t.layout._replace(num_features=n) for t, n in zip(tables, counts, strict=True)],
            self._names,
            [t.class_map for t in tables if t.class_map is not None],
            [space.feature for space in self.spaces],
        )


def lookups_of(tables: nn.ModuleDict, spaces: list[IdSpace]) -> list[TableLookup]:
    """Returns the lookups of a collection.

    Args:
        tables (nn.ModuleDict): its tables.
        spaces (list[IdSpace]): the id space of each feature, table after table.
    """
    with_kernels = {name for name, table in tables.items() if cast(Table, table).layout.has_kernels}
    groups = [[space for space in spaces if space.table in with_kernels]]
    groups += [[space] for space in spaces if space.table not in with_kernels]
    lookups: list[TableLookup] = []
    for group in filter(None, groups):
        lookups.append(TableLookup(tables, group, sum(len(lookup.spaces) for lookup in lookups)))
    return lookups


# `torch.fx` records calls, because the first reads offsets, and the backend depends on the device at run time.
torch.fx.wrap("batch_of")
torch.fx.wrap("look_up")
torch.fx.wrap("look_up_features")
