"""The collections of a model that can be replaced in place, and those that are refused."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
)

from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
from torchrec_qr.modules.embedding_collection import CompositionalEmbeddingCollection

_COLLECTIONS = (EmbeddingBagCollection, EmbeddingCollection)
_OURS = (CompositionalEmbeddingBagCollection, CompositionalEmbeddingCollection)
_INTERFACES = (EmbeddingBagCollectionInterface, EmbeddingCollectionInterface)

# Modules that split or copy what is inside of them, so that it can no longer be replaced.
_DISTRIBUTED = (DistributedModelParallel, ShardedModule, DistributedDataParallel, FullyShardedDataParallel)


@dataclass
class FoundCollection:
    """A collection inside of a model.

    Args:
        path (str): the name of the collection in the model, the first one if it has several.
        module (nn.Module): the collection.
        references (list[tuple[nn.Module, str]]): every module that has the collection as a child, and the child's name.
    """

    path: str
    module: Any
    references: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def is_ours(self) -> bool:
        """Returns whether the collection is compositional already. It then stays."""
        return isinstance(self.module, _OURS)

    @property
    def is_pooled(self) -> bool:
        """Returns whether the collection is one of bags."""
        return isinstance(self.module, EmbeddingBagCollection | CompositionalEmbeddingBagCollection)

    @property
    def configs(self) -> list[BaseEmbeddingConfig]:
        """The configs of the tables."""
        configs: list[BaseEmbeddingConfig] = (
            self.module.embedding_bag_configs() if self.is_pooled else self.module.embedding_configs()
        )
        return configs

    @property
    def tables(self) -> nn.ModuleDict:
        """The modules of the tables."""
        tables: nn.ModuleDict = self.module.embedding_bags if self.is_pooled else self.module.embeddings
        return tables

    def weight(self, table: str) -> nn.Parameter:
        """Returns the parameter of a plain table."""
        weight = self.tables[table].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def named(self, table: str) -> str:
        """Returns the words that begin a message about a table."""
        return f"table {table!r} of {self.path!r}"


def collections_in(model: nn.Module) -> list[FoundCollection]:
    """Returns TorchRec's collections inside of a model, and ours, in the order of the model.

    Raises:
        TypeError: ``model`` is no module, or is a collection itself.
        ValueError: the model has a sharded or wrapped module, a collection of another class, or none at all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress_: the model is of type {type(model).__name__}; allowed: a torch.nn.Module")
    if isinstance(model, _INTERFACES):
        raise TypeError(
            f"compress_: the model is itself of class {type(model).__name__}, which cannot be replaced in place; "
            "allowed: a module that contains it. Put it into one, such as holder = nn.ModuleList([collection]), and "
            "take holder[0] afterwards"
        )
    found: dict[nn.Module, FoundCollection] = {}
    for path, module in model.named_modules():
        _check_class(path, module)
        if type(module) in (*_COLLECTIONS, *_OURS):
            found[module] = FoundCollection(path, module)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in found:
                found[child].references.append((parent, name))
    if not found:
        raise ValueError(
            f"compress_: {type(model).__name__} contains no EmbeddingBagCollection or EmbeddingCollection of TorchRec; "
            "allowed: a model with one at least"
        )
    return list(found.values())


def _check_class(path: str, module: nn.Module) -> None:
    """Raises ValueError if a module is distributed, or a collection of a class that is not replaced."""
    class_name = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, _DISTRIBUTED):
        raise ValueError(
            f"compress_: {path or 'the model'!r} is a {class_name}; allowed: a model before it is sharded or wrapped "
            "for several ranks"
        )
    script_name = getattr(module, "original_name", None) if isinstance(module, torch.jit.ScriptModule) else None
    if script_name in [c.__name__ for c in _COLLECTIONS] or (
        isinstance(module, _INTERFACES) and type(module) not in (*_COLLECTIONS, *_OURS)
    ):
        raise ValueError(
            f"compress_: {path!r} is a {class_name}{' of ' + script_name if script_name else ''}; allowed: TorchRec's "
            "EmbeddingBagCollection and EmbeddingCollection themselves, neither subclasses nor fused, quantised or "
            "scripted ones"
        )
