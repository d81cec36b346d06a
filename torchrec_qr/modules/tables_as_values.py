"""The tables of a collection as plain values, which exported programs and graphs of `torch.fx` hold."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType

from torchrec_qr.ids import IdSpace
from torchrec_qr.modules.table import Table
from torchrec_qr.ops.description import TableLayout, layout_of_fields
from torchrec_qr.ops.served_operators import ServedTable, served_layout

_ROW_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class PooledValues(NamedTuple):
    """What a graph has of a pooled collection besides its weights and class maps.

    Args:
        layout (Tensor): see `torchrec_qr.ops.served_operators.served_layout`.
        names (str): as ``layout``.
        columns (int): ΣD.
        weighted (bool): whether to use the batch's weights of ids.
        tables (str): the tables, as `text_of` returns them.
        refusal (str): why the operators of served models do not have the tables, or nothing.
    """

    layout: Tensor
    names: str
    columns: int
    weighted: bool
    tables: str
    refusal: str


class SequenceValues(NamedTuple):
    """What a graph has of a collection without pooling besides its weights and class maps.

    Args:
        layouts, names, outputs, columns, indices: see `torchrec_qr.modules.served_batch.served_sequences`.
        tables, refusal: see `PooledValues`.
    """

    layouts: list[Tensor]
    names: list[str]
    outputs: list[str]
    columns: list[int]
    indices: list[tuple[str, int]]
    tables: str
    refusal: str


class TableParts(NamedTuple):
    """A table of a graph, in place of its module."""

    layout: TableLayout
    class_map: Tensor | None
    partitions: list[Tensor]

    def weights(self) -> list[Tensor]:
        """Returns the weights of the partitions."""
        return self.partitions


def served_tables(configs: Sequence[BaseEmbeddingConfig], modules: nn.ModuleDict) -> list[ServedTable]:
    """Returns the tables of a collection.

    Args:
        configs (Sequence[BaseEmbeddingConfig]): their configs.
        modules (nn.ModuleDict): the module of each.
    """
    tables = []
    for config in configs:
        module = cast(Table, modules[config.name])
        dtypes = [w.dtype for w in module.weights()]
        tables.append(
            ServedTable(
                config.name,
                tuple(config.feature_names),
                module.layout._replace(num_features=len(config.feature_names)),
                config.num_embeddings,
                getattr(config, "id_policy", "error"),
                isinstance(config, EmbeddingBagConfig) and config.pooling == PoolingType.MEAN,
                tuple(_ROW_TYPES.get(dtype, str(dtype)) for dtype in dtypes),
            )
        )
    return tables


def id_spaces(tables: Sequence[ServedTable]) -> list[IdSpace]:
    """Returns the id space of every feature of every table, in order."""
    return [IdSpace(t.name, feature, t.num_ids, t.out_of_range) for t in tables for feature in t.features]


def pooled_values(tables: Sequence[ServedTable], weighted: bool) -> PooledValues:
    """Returns what a graph has of the tables of a pooled collection."""
    refusal = _refusal(tables)
    layout, names = served_layout([] if refusal else tables)
    columns = sum(t.layout.dim * len(t.features) for t in tables)
    return PooledValues(layout, names, columns, weighted, text_of(tables), refusal)


def sequence_values(tables: Sequence[ServedTable], outputs: Sequence[str], need_indices: bool) -> SequenceValues:
    """Returns what a graph has of the tables of a collection without pooling."""
    refusal = _refusal(tables)
    alone = [t._replace(features=(feature,)) for t in tables for feature in t.features]
    described = [served_layout([] if refusal else [t]) for t in alone]
    return SequenceValues(
        [layout for layout, _ in described],
        [names for _, names in described],
        list(outputs),
        [t.layout.dim for t in alone],
        [(t.out_of_range, t.num_ids) for t in alone] if need_indices else [],
        text_of(tables),
        refusal,
    )


def _refusal(tables: Sequence[ServedTable]) -> str:
    return next(filter(None, map(_refusal_of, tables)), "")


def _refusal_of(table: ServedTable) -> str:
    layout = table.layout
    if not layout.is_served:
        return (
            f"table {table.name!r}: operation {layout.operation!r} with partitions of {list(layout.widths)} columns; "
            "allowed in an exported or scripted model: plain, mult, add and concat with up to 4 partitions of up to "
            "1,024 columns"
        )
    other = set(table.row_types) - set(_ROW_TYPES.values())
    if other:
        return f"table {table.name!r}: rows of {sorted(other)}; allowed in an exported or scripted model: " + ", ".join(
            map(str, _ROW_TYPES)
        )
    return ""


def text_of(tables: Sequence[ServedTable]) -> str:
    """Returns tables as a text, which `tables_of` reads."""
    return json.dumps(tables)


def tables_of(text: str) -> list[ServedTable]:
    """Returns the tables of a text.

    Example:
        >>> from torchrec_qr.ops.description import PartitionLayout
        >>> qr = TableLayout("mult", (PartitionLayout(8, 1, 25), PartitionLayout(8, 25, 4)), num_ids=100)
        >>> table = ServedTable("t", ("f",), qr, 100, "error", False, ("fp32", "fp32"))
        >>> tables_of(text_of([table])) == [table]
        True
    """
    return [_table_of(*fields) for fields in json.loads(text)]


def _table_of(
    name: str,
    features: list[str],
    layout: list[Any],
    num_ids: int,
    out_of_range: str,
    mean: bool,
    row_types: list[str],
) -> ServedTable:
    return ServedTable(name, tuple(features), layout_of_fields(*layout), num_ids, out_of_range, mean, tuple(row_types))


def parts_of(
    tables: Sequence[ServedTable], weights: Sequence[list[Tensor]], class_maps: Sequence[list[Tensor]]
) -> Mapping[str, TableParts]:
    """Returns each table with its weights and its class map, by its name.

    Args:
        tables (Sequence[ServedTable]): the tables.
        weights (Sequence[list[Tensor]]): K of each table.
        class_maps (Sequence[list[Tensor]]): the class map of each table, or none.
    """
    return {
        t.name: TableParts(t.layout, own_maps[0] if own_maps else None, own)
        for t, own, own_maps in zip(tables, weights, class_maps, strict=True)
    }
