"""From a float collection and a ``qconfig`` to the configs and types of its quantised twin."""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_qr.configs import DTYPES
from torchrec_qr.modules.table import CompositionalTable, PlainEmbedding, PlainEmbeddingBag, Table
from torchrec_qr.quant.quantised_table import QuantisedTable
from torchrec_qr.quant.row_storage import data_type_of

Config = TypeVar("Config", bound=BaseEmbeddingConfig)


def quantised_configs(configs: Sequence[Config], qconfig: Any) -> list[Config]:
    """Returns copies of configs with the ``data_type`` that a ``qconfig`` has for each table.

    Args:
        configs (Sequence[Config]): of the float tables.
        qconfig (Any): its ``weight().dtype`` is that of all tables, except those in its ``per_table_weight_dtype``, if
            it is a ``torchrec.modules.embedding_configs.QuantConfig``.

    Raises:
        NotImplementedError: rows cannot have the type.
    """
    of_table = getattr(qconfig, "per_table_weight_dtype", None) or {}
    copies = []
    for config in configs:
        own = copy.copy(config)
        own.data_type = data_type_of(of_table.get(config.name, qconfig.weight().dtype), config.name)
        copies.append(own)
    return copies


def checked_output_dtype(dtype: torch.dtype, tables: Sequence[BaseEmbeddingConfig]) -> torch.dtype:
    """Returns ``dtype``, the type of a quantised collection's output.

    Raises:
        NotImplementedError: it is no type of floats that tables have.
    """
    if dtype not in DTYPES.values():
        names, allowed = [table.name for table in tables], ", ".join(str(d) for d in DTYPES.values())
        raise NotImplementedError(f"tables {names}: output_dtype={dtype}; allowed: {allowed}")
    return dtype


def qconfig_of(module: nn.Module) -> Any:
    """Returns the ``qconfig`` of a float collection, by which torch and TorchRec ask for its quantised twin.

    Raises:
        ValueError: it has none.
    """
    qconfig = getattr(module, "qconfig", None)
    if qconfig is None:
        raise ValueError(
            f"{type(module).__name__}: it has no qconfig; allowed: a collection whose qconfig is set, as "
            "torchrec_qr.inference.quantize_embeddings sets it"
        )
    return qconfig


def store_all(tables: nn.ModuleDict, given: nn.Module) -> None:
    """Stores the rows of float tables, except those on the meta device, which have no values.

    Args:
        tables (nn.ModuleDict): the quantised tables.
        given (nn.Module): the float tables, of the same names.

    Raises:
        TypeError: they are no tables of ours.
        ValueError: rows cannot have a value.
    """
    for name, table in given.named_children():
        if not isinstance(table, Table):
            allowed = ", ".join(t.__name__ for t in (CompositionalTable, PlainEmbeddingBag, PlainEmbedding))
            raise TypeError(f"table {name!r}: it is a {type(table).__name__}; allowed: {allowed}")
        weights = table.weights()
        if not any(weight.is_meta for weight in weights):
            cast(QuantisedTable, tables[name]).store(weights)
