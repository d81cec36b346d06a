"""The fingerprint of a compositional table: a small tensor in its ``state_dict`` with the meaning of its rows.

A Chinese remainder and a mixed radix may have tensors of equal shapes, and so have the two groupings. Without a
fingerprint, a model could load one as the other and train on wrong rows.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.id_hash import IdHash
from torchrec_qr.partitions import ClassMap, QuotientRemainder

# Tables whose ids are hashed have this format, and append ``_HASH_HEADER``. All others keep the first format.
_FORMAT, _HASHED_FORMAT = 1, 2
# Append to these and never reorder them, because checkpoints hold their indices.
_KINDS = ("quotient_remainder", "mixed_radix", "chinese_remainder", "explicit", "hash")
_GROUPINGS = ("", "strided", "adjacent")
_OPERATIONS = ("mult", "add", "concat", "path")
_ACTIVATIONS = ("", "relu", "tanh")
_HASHES = ("none", *get_args(IdHash))
_HEADER = ("format", "kind", "grouping", "operation", "path_hidden", "path_activation", "map_hash", "num_embeddings")
_HASH_HEADER = ("id_hash", "hash_seed")


def fingerprint(config: CompositionalConfig) -> Tensor:
    """Returns (8 + 2K,) int64: format, kind, grouping, operation, MLP, hash of a class map, S, |P_j| and D_j.

    If ids are hashed, the hash and its seed come after S, (10 + 2K,).

    Args:
        config (CompositionalConfig): the table.

    Example:
        >>> from torchrec_qr import CompositionalEmbeddingBagConfig, QuotientRemainder
        >>> config = CompositionalEmbeddingBagConfig(name="t", num_embeddings=100, embedding_dim=8,
        ...     feature_names=["f"], partitions=QuotientRemainder(num_collisions=4))
        >>> fingerprint(config).tolist()
        [1, 0, 1, 0, 0, 0, 0, 100, 25, 4, 8, 8]
    """
    spec, bound = config.partitions, config.bound_partitions
    path = config.operation == "path"
    hashed = config.id_hash is not None
    header = (
        _HASHED_FORMAT if hashed else _FORMAT,
        _KINDS.index(spec.kind),
        _GROUPINGS.index(spec.grouping if isinstance(spec, QuotientRemainder) else ""),
        _OPERATIONS.index(config.operation),
        (config.path_hidden or 0) if path else 0,
        _ACTIVATIONS.index(config.path_activation) if path and config.path_hidden else 0,
        # Take 63 bits of the hash, because the tensor is int64.
        int(bound.sha256[:16], 16) >> 1 if isinstance(bound, ClassMap) else 0,
        bound.num_embeddings,
        *((_HASHES.index(config.id_hash), config.hash_seed) if config.id_hash is not None else ()),
    )
    return torch.tensor([*header, *bound.sizes, *config.partition_columns], dtype=torch.int64, device="cpu")


def differences(saved: Tensor, own: Tensor) -> list[str]:
    """Returns a phrase per field in which two fingerprints differ."""
    mine = _decode(own)
    theirs = _decode(saved)
    return [f"{field}: saved {theirs[field]}, here {mine[field]}" for field in mine if theirs[field] != mine[field]]


def check_fingerprint(table: str, saved: Tensor, own: Tensor) -> None:
    """Raises ValueError with the table and the differences if two fingerprints differ."""
    if differing := differences(saved, own):
        raise ValueError(f"table {table!r}: the checkpoint is of another table: {'; '.join(differing)}")


def check_form(saved: Container[str], path: str, compositional: bool) -> None:
    """Refuses a full table for a compositional one, and partitions for a plain one, which strict loading may skip.

    Args:
        saved (Container[str]): the keys of the state dict or the checkpoint.
        path (str): the table in these keys, such as ``embedding_bags.t``.
        compositional (bool): whether the table is compositional here.

    Raises:
        ValueError: the table is saved in the other form. The message has the table, the key, and what to do.

    Example:
        >>> check_form({"embedding_bags.t.partition_0.weight"}, "embedding_bags.t", compositional=True)
    """
    table, full, partition = path.rpartition(".")[2], f"{path}.weight", f"{path}.partition_0.weight"
    if compositional and full in saved and partition not in saved:
        raise ValueError(
            f"table {table!r}: the checkpoint has {full!r}, a full table, and the table here is compositional; "
            f"allowed: its partitions, {partition!r} and so on. To start from a full table, load it into TorchRec's "
            "own collection, and call torchrec_qr.compress_(model, partitions, fit=True)"
        )
    if not compositional and partition in saved and full not in saved:
        raise ValueError(
            f"table {table!r}: the checkpoint has {partition!r}, of a compositional table, and the table here is "
            f"plain; allowed: a full table, {full!r}. For full rows, load the checkpoint into a collection with the "
            "compositional config, and call torchrec_qr.inference.to_plain(collection)"
        )


def check_row_types(saved: Mapping[str, Any], path: str, quantised: bool) -> None:
    """Refuses quantised rows for rows of floats, and the reverse, because their shapes may be equal.

    Args:
        saved (Mapping[str, Any]): the state dict to load.
        path (str): the table in its keys, such as ``embedding_bags.t``.
        quantised (bool): whether rows are quantised here.

    Raises:
        ValueError: rows are saved in the other form. The message has the table, the key, and what is allowed.

    Example:
        >>> check_row_types({"embedding_bags.t.weight": torch.zeros(2, 8)}, "embedding_bags.t", quantised=False)
    """
    for key in (f"{path}.weight", f"{path}.partition_0.weight"):
        rows = saved.get(key)
        # The attribute of a sharded tensor warns of its deprecation.
        properties = rows.metadata().tensor_properties if isinstance(rows, ShardedTensor) else rows
        dtype = getattr(properties, "dtype", None)
        if dtype is not None and (dtype == torch.uint8) != quantised:
            allowed = (
                "those of a quantised collection, which torchrec_qr.inference.quantize_embeddings makes of a float one"
                if quantised
                else "those of a float collection, before it was quantised"
            )
            raise ValueError(
                f"table {path.rpartition('.')[2]!r}: {key!r} has rows of {dtype} in the checkpoint; allowed: {allowed}"
            )


def check_saved_tables(
    state_dict: Mapping[str, Tensor], prefix: str, tables: Iterable[tuple[CompositionalConfig, Tensor]]
) -> None:
    """Compares ``<prefix><table>.fingerprint`` in a state dict with the fingerprint of each table.

    The function writes the buffers anew first, because DCP loads in place and may have put saved values there.

    Args:
        state_dict (Mapping[str, Tensor]): the state dict to load.
        prefix (str): the prefix of its keys.
        tables (Iterable[tuple[CompositionalConfig, Tensor]]): the config and the fingerprint buffer of each table.

    Raises:
        ValueError: the first table that differs, see `check_fingerprint`.
    """
    found = []
    for config, buffer in tables:
        saved = state_dict.get(f"{prefix}{config.name}.fingerprint")
        if saved is not None:
            found.append((config.name, saved.clone(), fingerprint(config)))
            buffer.copy_(fingerprint(config))
    for name, saved, own in found:
        check_fingerprint(name, saved, own)


def _decode(fingerprint: Tensor) -> dict[str, object]:
    values = fingerprint.tolist()
    hashed = values[0] == _HASHED_FORMAT
    header = (*_HEADER, *_HASH_HEADER) if hashed else _HEADER
    fields: dict[str, object] = dict(zip(header, values, strict=False))
    fields |= {name: fields.get(name, 0) for name in _HASH_HEADER}
    if hashed:
        # Leave the difference to the hash, because both formats are read here.
        fields["format"] = _FORMAT
    for field, names in (
        ("kind", _KINDS),
        ("grouping", _GROUPINGS),
        ("operation", _OPERATIONS),
        ("path_activation", _ACTIVATIONS),
        ("id_hash", _HASHES),
    ):
        code = fields[field]
        assert isinstance(code, int)
        fields[field] = names[code] if code < len(names) else f"unknown ({code})"
    rest = values[len(header) :]
    return fields | {"sizes": rest[: len(rest) // 2], "columns": rest[len(rest) // 2 :]}
