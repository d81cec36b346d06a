"""The lookups of a quantised collection: one call for consecutive tables of the operators, and PyTorch's for others."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_qr.modules.served_batch import check_served, served_pooled
from torchrec_qr.ops.served_operators import ServedTable, served_layout
from torchrec_qr.ops.serving_reference import pooled_rows
from torchrec_qr.quant.quantised_table import Held, QuantisedTable


class ServedNumbers(nn.Module):
    """The arguments of the operators that say what tables are. They stay on the CPU, where the operators read them.

    Args:
        tables (Sequence[ServedTable]): the tables of one call.
    """

    numbers: Tensor

    def __init__(self, tables: Sequence[ServedTable]) -> None:
        super().__init__()
        numbers, self.names = served_layout(tables)
        self.register_buffer("numbers", numbers, persistent=False)
        self.columns = sum(table.layout.dim * len(table.features) for table in tables)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ServedNumbers":
        return self


class ServedGroup(ServedNumbers):
    """Consecutive tables of a pooled collection in one call of the operator.

    Args:
        tables (Sequence[QuantisedTable]): the tables.
    """

    def __init__(self, tables: Sequence[QuantisedTable]) -> None:
        super().__init__([table.served(table.config.feature_names) for table in tables])
        self._rows = Held(rows for table in tables for rows in table.rows())
        self._maps = Held(class_map for table in tables for class_map in table.maps())

    def forward(self, features: KeyedJaggedTensor, tables: nn.ModuleDict, weighted: bool) -> Tensor:
        """Returns (B, ΣD) fp32 of the group's features."""
        rows, maps = self._rows.tensors(), self._maps.tensors()
        return served_pooled(features, rows, maps, self.numbers, self.names, weighted, self.columns)


class PyTorchGroup(nn.Module):
    """One table of a pooled collection that the operators do not have.

    Args:
        table (QuantisedTable): the table.
    """

    def __init__(self, table: QuantisedTable) -> None:
        super().__init__()
        self._name = table.config.name

    def forward(self, features: KeyedJaggedTensor, tables: nn.ModuleDict, weighted: bool) -> Tensor:
        """Returns (B, ΣD) fp32 of the table's features.

        Raises:
            NotImplementedError: the call is traced, compiled or exported.
        """
        table = cast(QuantisedTable, tables[self._name])
        pooled = []
        for feature in table.config.feature_names:
            given = ids_of(table, features, feature, weighted)
            rows = table.composed(table.bounded(given.values(), feature))
            id_weights = given.weights().float() if weighted else None
            pooled.append(pooled_rows(rows, given.lengths(), id_weights, table.is_mean))
        return torch.cat(pooled, dim=1)


def pooled_groups(tables: Sequence[QuantisedTable]) -> nn.ModuleList:
    """Returns the fewest lookups of a pooled collection that keep the order of its tables."""
    groups = nn.ModuleList()
    for is_served, group in groupby(tables, key=lambda table: table.is_served):
        own = list(group)
        groups.extend([ServedGroup(own)] if is_served else [PyTorchGroup(table) for table in own])
    return groups


def ids_of(table: QuantisedTable, features: KeyedJaggedTensor, feature: str, weighted: bool = False) -> JaggedTensor:
    """Returns the ids of a feature, for a table that PyTorch looks up.

    Raises:
        TypeError, ValueError: see `torchrec_qr.modules.served_batch.served_pooled`.
        NotImplementedError: the call is traced, compiled or exported, which only the operators can be.
        KeyError: the batch lacks the feature.
    """
    if isinstance(features, torch.fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise NotImplementedError(
            f"table {table.config.name!r}: operation {table.layout.operation!r} with {len(table.layout.partitions)} "
            "partitions is looked up in PyTorch; allowed in traced, compiled and exported models: plain, mult, add and "
            "concat with at most 4 partitions of at most 1024 columns"
        )
    check_served(features, weighted)
    keys = features.keys()
    if feature not in keys:
        raise KeyError(f"table {table.config.name!r}: feature {feature!r} is not in the batch; its keys are {keys}")
    return features[feature]


torch.fx.wrap("served_pooled")
