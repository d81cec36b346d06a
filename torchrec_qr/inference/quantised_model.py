"""A model whose embedding collections have quantised rows, ours and TorchRec's."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.ao.quantization import PlaceholderObserver, swap_module
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import QuantConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
)
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.quant import embedding_modules as theirs

from torchrec_qr.quant import QuantCompositionalEmbeddingBagCollection, QuantCompositionalEmbeddingCollection
from torchrec_qr.quant.conversion import checked_output_dtype
from torchrec_qr.quant.row_storage import data_type_of
from torchrec_qr.quant.torchrec_entries import quantised_class

Model = TypeVar("Model", bound=nn.Module)
_THEIRS: dict[type[nn.Module], type[nn.Module]] = {
    EmbeddingBagCollection: theirs.EmbeddingBagCollection,
    EmbeddingCollection: theirs.EmbeddingCollection,
    FeatureProcessedEmbeddingBagCollection: theirs.FeatureProcessedEmbeddingBagCollection,
}
_QUANTISED = (
    theirs.EmbeddingBagCollection,
    theirs.EmbeddingCollection,
    QuantCompositionalEmbeddingBagCollection,
    QuantCompositionalEmbeddingCollection,
)
_COLLECTIONS = (EmbeddingBagCollectionInterface, EmbeddingCollectionInterface, FeatureProcessedEmbeddingBagCollection)


def quantize_embeddings(
    model: Model,
    dtype: torch.dtype,
    *,
    inplace: bool = False,
    output_dtype: torch.dtype = torch.float32,
    per_table_weight_dtype: Mapping[str, torch.dtype] | None = None,
) -> Model:
    """Returns a model whose embedding collections have quantised rows, in eval mode.

    Collections of ours become `QuantCompositionalEmbeddingBagCollection` and `QuantCompositionalEmbeddingCollection`.
    TorchRec's collections become those of ``torchrec.quant``. Both may be anywhere in the model, or be the model, also
    within a ``FeatureProcessedEmbeddingBagCollection``. A module that occurs twice is quantised once. A collection on
    the meta device becomes a quantised one on the meta device, into which a state dict can be loaded.

    The function has the form of ``torchrec.inference.modules.quantize_embeddings``, and refuses what that leaves as it
    is.

    Args:
        model (Model): the model, not sharded.
        dtype (torch.dtype): of rows: ``torch.qint8`` (also ``torch.int8`` and ``torch.quint8``), ``torch.quint4x2``, or
            a type of floats.
        inplace (bool): whether to change the model. Otherwise the result is a copy, which copies no float table.
        output_dtype (torch.dtype): of the collections' outputs: fp32, fp16 or bf16.
        per_table_weight_dtype (Mapping[str, torch.dtype] | None): the ``dtype`` of single tables, by their names.

    Returns:
        Model: the model, or the quantised collection if the model is one.

    Raises:
        ValueError: the model has no collection, a sharded or a quantised one; or no table of a name; or rows cannot
            have a value.
        TypeError: there is no quantised form of a collection's class.
        NotImplementedError: rows or outputs cannot have a type.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from torchrec_qr import (
        ...     CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder)
        >>> model = torch.nn.ModuleDict({
        ...     "sparse": CompositionalEmbeddingBagCollection(tables=[CompositionalEmbeddingBagConfig(
        ...         name="t_user", feature_names=["user"], num_embeddings=1000, embedding_dim=8,
        ...         partitions=QuotientRemainder(num_collisions=4))]),
        ...     "small": EmbeddingBagCollection(tables=[EmbeddingBagConfig(
        ...         name="t_day", feature_names=["day"], num_embeddings=7, embedding_dim=8)])})
        >>> served = quantize_embeddings(model, torch.qint8, per_table_weight_dtype={"t_user": torch.quint4x2})
        >>> [type(module).__name__ for module in served.values()]
        ['QuantCompositionalEmbeddingBagCollection', 'EmbeddingBagCollection']
        >>> served["sparse"].embedding_bag_configs()[0].data_type
        <DataType.INT4: 'INT4'>
    """
    found = dict(_collections(model, ""))
    _check(found, dtype, output_dtype, per_table_weight_dtype or {})
    qconfig = QuantConfig(
        activation=PlaceholderObserver.with_args(dtype=output_dtype),
        weight=PlaceholderObserver.with_args(dtype=dtype),
        per_table_weight_dtype=dict(per_table_weight_dtype or {}),
    )
    quantised = {id(module): _quantised(module, qconfig) for module in {id(m): m for m in found.values()}.values()}
    if not inplace:
        return copy.deepcopy(model, dict(quantised)).eval()
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in quantised:
                module._modules[name] = quantised[id(child)]
    return quantised.get(id(model), model).eval()


def _quantised(module: nn.Module, qconfig: QuantConfig) -> Any:
    twin = quantised_class(module) or _THEIRS[type(module)]
    vars(module)["qconfig"] = qconfig
    try:
        return swap_module(module, {type(module): twin}, {})
    finally:
        vars(module).pop("qconfig")


def _collections(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the collections of a model by their names, those within feature-processed ones of ours among them.

    Raises:
        ValueError: a collection is sharded or quantised.
        TypeError: there is no quantised form of a collection's class.
    """
    label = f"module {name!r} ({type(module).__name__})" if name else type(module).__name__
    if isinstance(module, ShardedModule):
        raise ValueError(f"{label}: it is sharded; allowed: an unsharded model with its weights")
    if isinstance(module, FeatureProcessedEmbeddingBagCollection) and quantised_class(module._embedding_bag_collection):
        yield f"{name}._embedding_bag_collection", module._embedding_bag_collection
        return
    if isinstance(module, _COLLECTIONS):
        if isinstance(module, _QUANTISED):
            raise ValueError(f"{label}: it is quantised; allowed: collections of float tables")
        if quantised_class(module) is None and type(module) not in _THEIRS:
            raise TypeError(
                f"{label}: there is no quantised form of its class; allowed: collections of TorchRec and torchrec_qr, "
                "and no classes derived from them"
            )
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _collections(child, f"{name}.{child_name}" if name else child_name)


def _check(
    found: Mapping[str, nn.Module], dtype: torch.dtype, output_dtype: torch.dtype, of_table: Mapping[str, torch.dtype]
) -> None:
    if not found:
        raise ValueError("the model has no embedding collection; allowed: a model with one or more")
    tables = [config for module in found.values() for config in _configs(module)]
    names = [config.name for config in tables]
    if unknown := sorted(set(of_table) - set(names)):
        raise ValueError(f"per_table_weight_dtype: there are no tables {unknown}; allowed: {names}")
    for name in names:
        data_type_of(of_table.get(name, dtype), name)
    checked_output_dtype(output_dtype, tables)


def _configs(module: Any) -> list[Any]:
    if isinstance(module, FeatureProcessedEmbeddingBagCollection):
        return _configs(module._embedding_bag_collection)
    pooled = isinstance(module, EmbeddingBagCollectionInterface)
    return list(module.embedding_bag_configs() if pooled else module.embedding_configs())
