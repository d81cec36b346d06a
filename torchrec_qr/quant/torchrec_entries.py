"""The entries of our collections where TorchRec's own quantisation looks: ``torchrec.inference.modules``.

- ``quantize_inference_model`` looks the name of a class up in ``DEFAULT_QUANT_MAPPING``.
- ``quantize_embeddings`` has a mapping of its own, and takes more by arguments. Their defaults are None; they become
  the entries of our collections, because a caller of the function names none.
- ``shard_quant_model`` dispatches on the classes of ``DEFAULT_SHARDERS``.
- A feature-processed collection is quantised by a class of TorchRec's, whatever it has inside.

All entries name TorchRec's quantised collections. Their ``from_float`` returns ours for a collection of ours with a
compositional table, and TorchRec's for plain tables alone, whose lookups TorchRec's sharding and tracing know.
"""

import copy
import inspect
from functools import wraps
from typing import Any, cast

import torch
from torch import nn
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.quant import embedding_modules as theirs

from torchrec_qr.configs import is_compositional
from torchrec_qr.quant.quant_bag_collection import QuantCompositionalEmbeddingBagCollection
from torchrec_qr.quant.quant_collection import QuantCompositionalEmbeddingCollection
from torchrec_qr.quant.quant_sharder import QuantCompositionalSharder

try:
    from torchrec.inference import modules as inference

    _MAPPING, _SHARDERS = inference.DEFAULT_QUANT_MAPPING, inference.DEFAULT_SHARDERS
    _QUANTISED_BY_THEM = (
        theirs.EmbeddingBagCollection,
        theirs.EmbeddingCollection,
        theirs.FeatureProcessedEmbeddingBagCollection,
    )
    _PARAMETERS = inspect.signature(inference.quantize_embeddings).parameters
    _KEYS_OF_CALL, _MAPPING_OF_CALL = (
        _PARAMETERS[name].name for name in ("additional_qconfig_spec_keys", "additional_mapping")
    )
except (AttributeError, KeyError) as error:
    raise ImportError(
        f"this version of TorchRec has no {error} in its quantisation, by which it would leave compositional tables "
        "as floats; `torchrec-qr doctor` names the versions that are tested"
    ) from error

for _quantised in (QuantCompositionalEmbeddingBagCollection, QuantCompositionalEmbeddingCollection):
    _SHARDERS.append(cast(Any, QuantCompositionalSharder(_quantised)))

_OURS: dict[type[nn.Module], Any] = {}
_THEIRS: dict[type[nn.Module], Any] = {}
_KEYS: list[type[nn.Module]] = []


def quantised_class(module: nn.Module) -> Any:
    """Returns the class of the quantised twin of a float collection of ours, or None for another module."""
    return _OURS.get(type(module))


def _compositional_class(module: Any) -> Any:
    """Returns `quantised_class` of a collection with a compositional table, or None."""
    twin = quantised_class(module)
    return twin if twin and any(map(is_compositional, module.embedding_configs())) else None


def register_quantised(collection: type[nn.Module], quantised: Any, of_plain_tables: Any) -> None:
    """Makes TorchRec's quantisation take a collection of ours.

    Args:
        collection (type[nn.Module]): the float class.
        quantised (Any): its quantised twin.
        of_plain_tables (Any): TorchRec's quantised collection, for plain tables alone.
    """
    if not _OURS:
        _take_entries_of_calls()
        for own in _QUANTISED_BY_THEM:
            _return_ours(own)
    _OURS[collection] = quantised
    _THEIRS[collection] = of_plain_tables
    _KEYS.append(collection)
    _MAPPING[torch.typename(collection)] = of_plain_tables


def _take_entries_of_calls() -> None:
    """Makes our entries the defaults of ``quantize_embeddings``, also in modules that have imported it before."""
    function: Any = inference.quantize_embeddings
    with_defaults = [p.name for p in _PARAMETERS.values() if p.default is not p.empty]
    ours = {_KEYS_OF_CALL: _KEYS, _MAPPING_OF_CALL: _THEIRS}
    function.__defaults__ = tuple(
        ours.get(name, default) for name, default in zip(with_defaults, function.__defaults__, strict=True)
    )


def _return_ours(own: Any) -> None:
    """Makes ``from_float`` of a class of TorchRec's return our twin of a collection of compositional tables."""
    original = own.from_float.__func__

    @wraps(original)
    def from_float(cls: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if twin := _compositional_class(module):
            return twin.from_float(module)
        if isinstance(module, FeatureProcessedEmbeddingBagCollection):
            inner = module._embedding_bag_collection
            if twin := _compositional_class(inner):
                vars(inner)["qconfig"] = module.qconfig
                try:
                    processed = copy.deepcopy(module, {id(inner): twin.from_float(inner)})
                finally:
                    vars(inner).pop("qconfig")
                vars(processed).pop("qconfig")
                return processed
        return original(cls, module, *args, **kwargs)

    own.from_float = classmethod(from_float)
