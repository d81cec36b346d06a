"""The lookup of a served model's batch, which exporters, tracers and ``torch.jit.script`` go through.

Each function takes plain values and tensors. TorchScript compiles them, and `torch.fx` records a call of one.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torchrec.pt2.checks import pt2_checks_tensor_slice
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_qr.ops import served_operators  # noqa: F401  (registers the operators)


def feature_positions(keys: list[str], names: str) -> list[int]:
    """Returns the position in a batch of each feature of each table.

    Args:
        keys (list[str]): the keys of the batch.
        names (str): tables and their features, as `torchrec_qr.ops.served_operators.served_layout` returns them.

    Raises:
        KeyError: the batch lacks a feature.

    Example:
        >>> feature_positions(["country", "user"], "t_user\\tuser\\nt_country\\tcountry")
        [1, 0]
    """
    number: dict[str, int] = {}
    for i, key in enumerate(keys):
        number[key] = i
    positions: list[int] = []
    for line in names.split("\n"):
        words = line.split("\t")
        for feature in words[1:]:
            if feature not in number:
                raise KeyError(f"table '{words[0]}': feature '{feature}' is not in the batch; its keys are {keys}")
            positions.append(number[feature])
    return positions


@lru_cache
def _known_positions(keys: tuple[str, ...], names: str) -> list[int]:
    return feature_positions(list(keys), names)


@torch.fx.wrap
def served_pooled(
    features: KeyedJaggedTensor,
    weights: list[Tensor],
    class_maps: list[Tensor],
    layout: Tensor,
    names: str,
    weighted: bool,
    columns: int,
) -> Tensor:
    """Returns (B, ΣD) fp32: each feature of each table, pooled.

    Args:
        features (KeyedJaggedTensor): F features × B bags in any order, and any others.
        weights (list[Tensor]): K partitions of each table.
        class_maps (list[Tensor]): one of each table with explicit partitions.
        layout (Tensor): as `torchrec_qr.ops.served_operators.served_layout` returns it.
        names (str): as ``layout``.
        weighted (bool): whether to use the batch's weights of ids.
        columns (int): ΣD.

    Raises:
        KeyError: the batch lacks a feature.
        IndexError: an id is outside [0, S). An exported program and TorchScript raise RuntimeError with the same text.
        NotImplementedError: features differ in their numbers of bags.
        TypeError: ids are not integers.
        ValueError: the batch has no weights, or not one per id, though ``weighted``.
    """
    check_served(features, weighted)
    ids, lengths = features.values().contiguous(), features.lengths().contiguous()
    keys, bags = features.keys(), features.stride()
    id_weights: Tensor | None = None
    if weighted:
        id_weights = features.weights().float().contiguous()
    if torch.jit.is_scripting():
        positions = feature_positions(keys, names)
        # Copy lists, because the operator takes the tensors out of those of TorchScript.
        return torch.ops.torchrec_qr_serving.pooled(
            list(weights), list(class_maps), layout, names, ids, lengths, id_weights, positions, bags, columns
        )
    else:
        return _pooled(weights, class_maps, layout, names, ids, lengths, id_weights, keys, bags, columns)


@torch.fx.wrap
def served_sequences(
    features: KeyedJaggedTensor,
    weights: list[list[Tensor]],
    class_maps: list[list[Tensor]],
    layouts: list[Tensor],
    names: list[str],
    outputs: list[str],
    columns: list[int],
    indices: list[tuple[str, int]],
) -> dict[str, JaggedTensor]:
    """Returns (N, D) fp32 of each feature of each table, not pooled, by the name of its output.

    Args:
        features (KeyedJaggedTensor): as `served_pooled` has it.
        weights, class_maps, layouts, names, outputs, columns: one entry for each feature of each table.
        indices (list[tuple[str, int]]): empty, or the ``out_of_range`` and S of each feature. ``weights()`` of each
            output then has the ids, brought into [0, S).

    Raises:
        As `served_pooled`.
    """
    check_served(features, False)
    keys = features.keys()
    ids, starts = features.values().contiguous(), features.offset_per_key()
    lengths = features.lengths().view(len(keys), features.stride())
    found: dict[str, JaggedTensor] = {}
    for i, output in enumerate(outputs):
        position = feature_positions(keys, names[i])[0]
        start, end = starts[position], starts[position + 1]
        pt2_checks_tensor_slice(ids, start, end)
        own = ids[start:end]
        if torch.jit.is_scripting():
            values = torch.ops.torchrec_qr_serving.composed(
                # Copy lists, because the operator takes the tensors out of those of TorchScript.
                list(weights[i]),
                list(class_maps[i]),
                layouts[i],
                names[i],
                own,
                columns[i],
            )
        else:
            values = _composed(weights[i], class_maps[i], layouts[i], names[i], own, columns[i])
        of_output: Tensor | None = None
        if len(indices) > 0:
            of_output = _bounded(own, indices[i][0], indices[i][1])
        found[output] = JaggedTensor(values=values, lengths=lengths[position], weights=of_output)
    return found


def check_served(features: KeyedJaggedTensor, weighted: bool) -> None:
    """Raises if the operators cannot look a batch up: see `served_pooled`."""
    ids = features.values()
    if ids.dtype != torch.int32 and ids.dtype != torch.int64:
        raise TypeError(f"features {features.keys()}: ids have dtype {ids.dtype}; allowed: int32, int64")
    if features.variable_stride_per_key() or features.inverse_indices_or_none() is not None:
        raise NotImplementedError(
            f"features {features.keys()}: a number of bags for each feature, or inverse indices; allowed in a served "
            "model: one number of bags for all"
        )
    # An exporter does not know whether the numbers are equal, and its programs check the shapes of their inputs.
    if torch.jit.is_scripting():
        _check_lengths(features)
    else:
        if not torch.compiler.is_compiling():
            _check_lengths(features)
    if weighted:
        weights = features.weights_or_none()
        if weights is None:
            raise ValueError(f"a weighted collection got a batch without weights; its keys are {features.keys()}")
        if weights.numel() != ids.numel():
            raise ValueError(
                f"features {features.keys()}: {weights.numel()} weights for {ids.numel()} ids; allowed: one weight per "
                "id"
            )


def _check_lengths(features: KeyedJaggedTensor) -> None:
    count, keys = features.lengths().numel(), features.keys()
    if count != len(keys) * features.stride():
        raise ValueError(f"features {keys}: {count} lengths; allowed: one of each bag of the {len(keys)} features")


def _bounded(ids: Tensor, out_of_range: str, num_ids: int) -> Tensor:
    ids = ids.to(torch.int64)
    if out_of_range == "clamp":
        ids = ids.clamp(0, num_ids - 1)
    elif out_of_range == "wrap":
        ids = ids.remainder(num_ids)
    return ids


def _pooled(
    weights: list[Tensor],
    class_maps: list[Tensor],
    layout: Tensor,
    names: str,
    ids: Tensor,
    lengths: Tensor,
    id_weights: Tensor | None,
    keys: list[str],
    bags: int,
    columns: int,
) -> Tensor:
    operator = torch.ops.torchrec_qr_serving.pooled
    if torch.compiler.is_compiling():
        positions = feature_positions(keys, names)
        maps = class_maps or [layout]  # programs of AOTInductor cannot pass an empty list
        return operator(weights, maps, layout, names, ids, lengths, id_weights, positions, bags, columns)
    known = _known_positions(tuple(keys), names)
    try:
        return operator(weights, class_maps, layout, names, ids, lengths, id_weights, known, bags, columns)
    except RuntimeError as error:
        raise _as_in_python(error) from None


def _composed(
    weights: list[Tensor], class_maps: list[Tensor], layout: Tensor, names: str, ids: Tensor, columns: int
) -> Tensor:
    operator = torch.ops.torchrec_qr_serving.composed
    if torch.compiler.is_compiling():
        return operator(weights, class_maps or [layout], layout, names, ids, columns)
    try:
        return operator(weights, class_maps, layout, names, ids, columns)
    except RuntimeError as error:
        raise _as_in_python(error) from None


def _as_in_python(error: RuntimeError) -> Exception:
    # The stable ABI of C++ has no other error than RuntimeError.
    return IndexError(str(error)) if "is outside [0, " in str(error) else error
