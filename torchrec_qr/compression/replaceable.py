"""Checks that nothing of a model is lost or left behind if its collections are replaced."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from torchrec_qr.compression.found_collections import FoundCollection
from torchrec_qr.configs import DTYPES

# Modules that write to single rows of a table, which a compositional table does not have.
_WRITING_ROWS = (BaseManagedCollisionEmbeddingCollection, ITEPEmbeddingBagCollection, ITEPEmbeddingCollection)

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_post_accumulate_grad_hooks",
)


class References:
    """The modules of a model that refer to others, or to parameters.

    Args:
        model (nn.Module): the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._children: dict[int, list[str]] = defaultdict(list)
        self._attributes: dict[int, list[str]] = defaultdict(list)
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            for name, child in {**module._modules, **module._parameters}.items():
                self._children[id(child)].append(f"{prefix}{name}")
            for name, value in _attributes(module):
                self._attributes[id(value)].append(f"{prefix}{name}")

    def check(self, found: FoundCollection, compressed: Collection[str]) -> None:
        """Checks a collection that is replaced.

        Args:
            found (FoundCollection): the collection.
            compressed (Collection[str]): the names of its tables that become compositional.

        Raises:
            ValueError: a hook would be lost, something else refers to what is replaced, or a table is no longer what
                its config describes. The message has the path or the table.
        """
        collection, tables = found.module, found.tables
        for parent, _ in found.references:
            if compressed and isinstance(parent, _WRITING_ROWS):
                raise ValueError(
                    f"compress_: {found.path!r} with the tables {sorted(compressed)} to compress is inside of a "
                    f"{type(parent).__name__}, which writes to the row of an id; allowed: tables={{name: None}} for "
                    "them"
                )
        for name, module in ((repr(found.path), collection), (f"the tables of {found.path!r}", tables)):
            _check_no_hooks(name, module)
            for attribute in self._attributes[id(module)]:
                raise ValueError(
                    f"compress_: {attribute} refers to {name}, which is replaced, outside of the child modules; "
                    "allowed: no reference other than as a child module"
                )
        for config in found.configs:
            name, table = found.named(config.name), tables[config.name]
            _check_no_hooks(name, table)
            _check_table(name, config, table)
            if config.name in compressed:
                weight = found.weight(config.name)
                _check_no_hooks(f"the weight of {name}", weight)
                self._check_alone(name, config.name, (tables, table, weight))

    def _check_alone(self, name: str, table: str, parts: tuple[object, ...]) -> None:
        places = [path for part in parts for path in (*self._children[id(part)], *self._attributes[id(part)])]
        if len(places) > len(parts):
            raise ValueError(
                f"compress_: {name} is to be compressed, and its module or weight is used in several places, "
                f"{', '.join(places)}, which would no longer share it; allowed: tables={{{table!r}: None}}, which "
                "keeps the table and what it shares"
            )


def _attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yields the attributes of a module that are no children or parameters, and what containers among them hold."""
    for name, value in vars(module).items():
        if name in ("_modules", "_parameters", "_buffers"):
            continue
        inside: Any = value.values() if isinstance(value, Mapping) else value
        held = inside if isinstance(inside, list | tuple | set) or isinstance(value, Mapping) else [value]
        for item in held:
            # A bound method refers to its module.
            yield name, getattr(item, "__self__", item) if callable(item) else item


def _check_no_hooks(name: str, owner: nn.Module | Tensor) -> None:
    for kind in _HOOKS:
        if getattr(owner, kind, None):
            raise ValueError(f"compress_: {name} has {kind}, which would be lost; allowed: no hooks, added afterwards")


def _check_table(name: str, config: Any, table: nn.Module) -> None:
    """Checks that a table is what TorchRec builds from its config."""
    if type(table) not in (nn.EmbeddingBag, nn.Embedding):
        raise ValueError(
            f"compress_: {name} is a {type(table).__qualname__}; allowed: nn.EmbeddingBag and nn.Embedding, as "
            "TorchRec builds them"
        )
    weight, shape = table.weight, (config.num_embeddings, config.embedding_dim)
    assert isinstance(weight, Tensor)
    if type(weight.data) is not Tensor:
        raise ValueError(
            f"compress_: the weight of {name} is a {type(weight.data).__qualname__}; allowed: a whole tensor on one "
            "device, before it is sharded or made parallel"
        )
    # TorchRec's collections have fp16 for all types that are not fp32.
    allowed = [DTYPES.get(config.data_type, torch.float16)]
    allowed += [torch.float16] if config.data_type == DataType.BF16 else []
    if tuple(weight.shape) != shape or weight.dtype not in allowed:
        raise ValueError(
            f"compress_: the weight of {name} has shape {tuple(weight.shape)} and type {weight.dtype}; allowed by its "
            f"config: shape {shape} and type {allowed[0]}"
        )
