"""The lookup of a collection as one call, which `torch.fx` records, and TorchScript and exporters go through.

In Python the call is the collection's own lookup, with gradients. TorchScript and ``torch.export`` have in its place
the operators of served models, which C++ has, without gradients.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_qr.modules.collection_lookup import PooledLookup, SequenceLookup
from torchrec_qr.modules.served_batch import served_pooled, served_sequences
from torchrec_qr.modules.tables_as_values import PooledValues, SequenceValues, TableParts, parts_of, tables_of


@torch.compiler.assume_constant_result
def is_exported() -> bool:
    """Returns whether ``torch.export`` is tracing, and not ``torch.compile``.

    The function is called while a compiler traces, because that of PyTorch 2.11 takes ``is_exporting`` itself for true.
    """
    return torch.compiler.is_exporting()


@torch.fx.wrap
def pooled_in_graph(
    features: KeyedJaggedTensor, weights: list[list[Tensor]], class_maps: list[list[Tensor]], values: PooledValues
) -> Tensor:
    """Returns (B, ΣD) fp32, the values of a pooled collection's output.

    Args:
        features (KeyedJaggedTensor): F features × B bags.
        weights (list[list[Tensor]]): K partitions of each table.
        class_maps (list[list[Tensor]]): the class map of each table, or none.
        values (PooledValues): all else of the collection.

    Raises:
        NotImplementedError: the operators of served models do not have a table.
        As `torchrec_qr.modules.served_batch.served_pooled`.
    """
    if torch.jit.is_scripting():
        return _served_pooled(features, weights, class_maps, values)
    else:
        if is_exported():
            return _served_pooled(features, weights, class_maps, values)
        lookup = _pooled_lookup(values.tables, values.weighted)
        return lookup(parts_of(tables_of(values.tables), weights, class_maps), features)


@torch.fx.wrap
def sequences_in_graph(
    features: KeyedJaggedTensor, weights: list[list[Tensor]], class_maps: list[list[Tensor]], values: SequenceValues
) -> dict[str, JaggedTensor]:
    """Returns (N, D) fp32 of each feature of each table, the output of a collection without pooling.

    Args:
        features, weights, class_maps, values: as `pooled_in_graph` has them.

    Raises:
        As `pooled_in_graph`.
    """
    if torch.jit.is_scripting():
        return _served_sequences(features, weights, class_maps, values)
    else:
        if is_exported():
            return _served_sequences(features, weights, class_maps, values)
        lookup = _sequence_lookup(values.tables, tuple(values.outputs), len(values.indices) > 0)
        return lookup(parts_of(tables_of(values.tables), weights, class_maps), features)


def _served_pooled(
    features: KeyedJaggedTensor, weights: list[list[Tensor]], class_maps: list[list[Tensor]], values: PooledValues
) -> Tensor:
    if len(values.refusal) > 0:
        raise NotImplementedError(values.refusal)
    of_all: list[Tensor] = []
    maps_of_all: list[Tensor] = []
    for own in weights:
        of_all.extend(own)
    for own in class_maps:
        maps_of_all.extend(own)
    return served_pooled(features, of_all, maps_of_all, values.layout, values.names, values.weighted, values.columns)


def _served_sequences(
    features: KeyedJaggedTensor, weights: list[list[Tensor]], class_maps: list[list[Tensor]], values: SequenceValues
) -> dict[str, JaggedTensor]:
    if len(values.refusal) > 0:
        raise NotImplementedError(values.refusal)
    of_features: list[list[Tensor]] = []
    maps_of_features: list[list[Tensor]] = []
    table = -1
    last = ""
    for names in values.names:
        name = names.split("\t")[0]
        if table < 0 or name != last:
            table += 1
            last = name
        of_features.append(weights[table])
        maps_of_features.append(class_maps[table])
    return served_sequences(
        features,
        of_features,
        maps_of_features,
        values.layouts,
        values.names,
        values.outputs,
        values.columns,
        values.indices,
    )


@lru_cache(maxsize=64)
def _pooled_lookup(tables: str, weighted: bool) -> PooledLookup:
    return PooledLookup(tables_of(tables), _without_values(tables), weighted)


@lru_cache(maxsize=64)
def _sequence_lookup(tables: str, outputs: tuple[str, ...], need_indices: bool) -> SequenceLookup:
    return SequenceLookup(tables_of(tables), _without_values(tables), outputs, need_indices)


def _without_values(tables: str) -> Mapping[str, TableParts]:
    described = tables_of(tables)
    # A call has the maps, and lookups notice that they are others.
    maps = [[torch.empty(0)] if t.layout.has_map else [] for t in described]
    return parts_of(described, [[]] * len(described), maps)
