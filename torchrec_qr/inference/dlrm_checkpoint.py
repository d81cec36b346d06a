"""The embedding tables of a checkpoint of facebookresearch/dlrm, those of its ``--qr-flag`` among them."""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torchrec import EmbeddingBagConfig

from torchrec_qr.configs import CompositionalEmbeddingBagConfig
from torchrec_qr.fingerprint import fingerprint
from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
from torchrec_qr.partitions import QuotientRemainder

Operation = Literal["mult", "add", "concat"]

_KEY = re.compile(r"emb_l\.(\d+)\.(.+)")
_POOLING_WEIGHT = re.compile(r"v_W_l\.\d+")
# A file of dlrm has numbers of NumPy beside tensors. NumPy 1 and 2 name their class by different modules.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, *{type(np.dtype(code)) for code in ("f8", "f4", "i8", "i4", "u1", "?")}),
]


def load_dlrm_checkpoint(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    operation: Operation | None = None,
    multi_hot: bool | None = None,
    feature_names: Sequence[str] | None = None,
    num_embeddings: Sequence[int] | None = None,
) -> CompositionalEmbeddingBagCollection:
    """Returns the tables of a checkpoint of facebookresearch/dlrm, with equal outputs if bags have one id or none.

    A table that ``--qr-flag`` compressed has ``emb_l.<i>.weight_q`` (⌈S/m⌉, D) and ``emb_l.<i>.weight_r`` (m, D) for
    ``--qr-collisions`` m. It becomes a table of ``QuotientRemainder(num_collisions=m, grouping="adjacent")``: partition
    0 is the quotient x // m and partition 1 the remainder x % m. Every other table, such as one of at most
    ``--qr-threshold`` rows, has ``emb_l.<i>.weight`` and stays plain. All are pooled by SUM. Under ``concat`` a
    compressed table has 2·D columns, D of each partition, beside the D columns of plain tables.

    dlrm pools each of the two partitions before it composes them. Under ``add`` and ``concat`` this is the same
    function. Under ``mult`` a bag of several ids has another value here, and `load_dlrm_checkpoint` refuses
    ``multi_hot``.

    Args:
        checkpoint (str | os.PathLike[str] | Mapping[str, Any]): the file of ``--save-model``, its contents, or the
            model's state dict. The file is read by ``torch.load(weights_only=True)``.
        operation (str | None): ``--qr-operation``, which no checkpoint has: ``"mult"``, ``"add"`` or ``"concat"``.
            None is for checkpoints without compressed tables.
        multi_hot (bool | None): whether a bag may have several ids. It is required under ``mult``.
        feature_names (Sequence[str] | None): the feature of each table, by default TorchRec's ``cat_<i>``. Table
            ``t_<feature>`` has it.
        num_embeddings (Sequence[int] | None): S of each table, as in ``--arch-embedding-size``. By default all rows
            count: a compressed table has ⌈S/m⌉ · m ids.

    Returns:
        CompositionalEmbeddingBagCollection: on the CPU, with a copy of the checkpoint's values.

    Raises:
        ValueError: the checkpoint has no tables or lacks some, an argument is missing or does not fit them, bags of
            several ids are multiplied, or the file has more than tensors, numbers and strings.
        NotImplementedError: a table of ``--md-flag``, or ``--weighted-pooling=learned``.

    Warns:
        UserWarning: a compressed table has more than 2^24 ids. dlrm divides ids in float32, and larger quotients are
            wrong there, so that the rows of these ids differ.

    Example:
        >>> import torch
        >>> from torchrec import KeyedJaggedTensor
        >>> from torchrec_qr.inference import load_dlrm_checkpoint
        >>> saved = {"state_dict": {
        ...     "emb_l.0.weight_q": torch.tensor([[1.], [2.], [3.]]).expand(3, 4),
        ...     "emb_l.0.weight_r": torch.tensor([[1.], [10.]]).expand(2, 4),
        ...     "emb_l.1.weight": torch.ones(3, 4)}}
        >>> ebc = load_dlrm_checkpoint(saved, operation="mult", multi_hot=False)
        >>> [(c.name, c.num_embeddings, c.embedding_dim) for c in ebc.embedding_bag_configs()]
        [('t_cat_0', 6, 4), ('t_cat_1', 3, 4)]
        >>> #          bag 0  bag 1
        >>> # cat_0      [0]    [5]
        >>> # cat_1      [2]     []
        >>> out = ebc(KeyedJaggedTensor(keys=["cat_0", "cat_1"], values=torch.tensor([0, 5, 2]),
        ...                             lengths=torch.tensor([1, 1, 1, 0])))
        >>> out["cat_0"].tolist()  # 1 · 1, and 3 · 10
        [[1.0, 1.0, 1.0, 1.0], [30.0, 30.0, 30.0, 30.0]]
    """
    if operation is not None and operation not in get_args(Operation):
        raise ValueError(f"operation={operation!r}; allowed: {', '.join(get_args(Operation))}")
    weights = _weights_by_table(checkpoint)
    features = _one_each("feature_names", feature_names, [f"cat_{i}" for i in range(len(weights))])
    numbers = _one_each("num_embeddings", num_embeddings, [None] * len(weights))
    tables: list[EmbeddingBagConfig] = []
    values: dict[str, Tensor] = {}
    for i, (own, feature, number) in enumerate(zip(weights, features, numbers, strict=True)):
        name, key = f"t_{feature}", f"emb_l.{i}"
        if "weight" in own:
            tables.append(_plain(own["weight"], key, number, name=name, feature_names=[feature]))
            values[f"{name}.weight"] = own["weight"].clone()
            continue
        config = _compositional(own, key, number, operation, multi_hot, name=name, feature_names=[feature])
        tables.append(config)
        values[f"{name}.fingerprint"] = fingerprint(config)
        values |= {f"{name}.partition_{j}.weight": own[part].clone() for j, part in enumerate(("weight_q", "weight_r"))}
    collection = CompositionalEmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    collection.embedding_bags.load_state_dict(values, assign=True)
    return collection


def _weights_by_table(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Returns ``weight``, or ``weight_q`` and ``weight_r``, of each table."""
    contents = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint)
    state: Mapping[str, Any] = contents.get("state_dict", contents)
    if learned := [key for key in state if _POOLING_WEIGHT.fullmatch(key)]:
        raise NotImplementedError(
            f"{learned[0]!r}: --weighted-pooling=learned has a weight of each id, which no collection of TorchRec has; "
            "allowed: a model without it"
        )
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := _KEY.fullmatch(key):
            found.setdefault(int(match[1]), {})[match[2]] = value
    if sorted(found) != list(range(max(found, default=0) + 1)):
        given = [f"emb_l.{i}" for i in sorted(found)] or list(state)[:5]
        raise ValueError(f"the checkpoint has {given}; allowed: emb_l.0, emb_l.1 and so on, without gaps")
    for i, own in found.items():
        if any(name.startswith(("embs.", "proj.")) for name in own):
            raise NotImplementedError(f"emb_l.{i}: --md-flag is not supported; allowed: plain tables and --qr-flag")
        if set(own) not in ({"weight"}, {"weight_q", "weight_r"}):
            raise ValueError(f"emb_l.{i}: the checkpoint has {sorted(own)}; allowed: weight, or weight_q and weight_r")
        for name, value in own.items():
            if value.dim() != 2 or value.dtype != torch.float32:
                raise ValueError(
                    f"emb_l.{i}.{name}: has shape {tuple(value.shape)} and type {value.dtype}; allowed: (rows, D) "
                    f"of {torch.float32}"
                )
    return [found[i] for i in range(len(found))]


def _read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    # Map the file into memory, because it has optimizer state too. Files of PyTorch before 1.6 cannot be mapped.
    is_mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    # PyTorch raises any of these if a file is none of its own.
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{path}: has more than tensors, numbers and strings, or is no file of PyTorch; allowed: the file of "
            "--save-model"
        ) from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path}: holds a {type(contents).__name__}; allowed: the file of --save-model")
    return contents


def _one_each(argument: str, given: Sequence[Any] | None, default: list[Any]) -> Sequence[Any]:
    if given is None:
        return default
    if len(given) != len(default):
        raise ValueError(f"{argument}: has {len(given)} entries; allowed: {len(default)}, one for each table")
    return given


def _plain(weight: Tensor, key: str, number: int | None, **names: Any) -> EmbeddingBagConfig:
    rows, columns = weight.shape
    if number not in (None, rows):
        raise ValueError(f"{key}: num_embeddings={number}; allowed: {rows}, its rows")
    return EmbeddingBagConfig(num_embeddings=rows, embedding_dim=columns, **names)


def _compositional(
    own: Mapping[str, Tensor],
    key: str,
    number: int | None,
    operation: Operation | None,
    multi_hot: bool | None,
    **names: Any,
) -> CompositionalEmbeddingBagConfig:
    (quotients, width), (collisions, other_width) = own["weight_q"].shape, own["weight_r"].shape
    if operation is None:
        raise ValueError(
            f"{key}: is compressed, and operation is None; allowed: {', '.join(get_args(Operation))}, as --qr-operation"
        )
    if operation == "mult" and multi_hot is not False:
        raise ValueError(
            f"{key}: multi_hot={multi_hot}, and dlrm multiplies the pooled quotients and remainders of a bag, not the "
            "rows of each id; allowed: multi_hot=False, if every bag has one id or none, or a model that was trained "
            "with add or concat"
        )
    if operation != "concat" and width != other_width:
        raise ValueError(f"{key}: has {width} and {other_width} columns; allowed: as many in both, or operation concat")
    least, most = max(collisions, (quotients - 1) * collisions + 1), quotients * collisions
    if number is not None and not least <= number <= most:
        raise ValueError(
            f"{key}: num_embeddings={number}; allowed: {least} to {most}, by {quotients} quotients and {collisions} "
            "remainders"
        )
    config = CompositionalEmbeddingBagConfig(
        num_embeddings=most if number is None else number,
        embedding_dim=width + other_width if operation == "concat" else width,
        partitions=QuotientRemainder(num_collisions=collisions, grouping="adjacent"),
        operation=operation,
        partition_dims=[width, other_width] if operation == "concat" else None,
        **names,
    )
    if config.num_embeddings > 1 << 24:
        warnings.warn(
            f"{key}: dlrm divides ids in float32, and some quotients above id 2^24 are wrong there; the rows of these "
            "ids differ here",
            stacklevel=3,
        )
    return config
