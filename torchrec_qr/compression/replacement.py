"""The collection of ours that takes the place of one of TorchRec's, with the parameters of the tables that stay."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_qr.compression.fit import Fit
from torchrec_qr.compression.found_collections import FoundCollection
from torchrec_qr.configs import is_compositional
from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
from torchrec_qr.modules.embedding_collection import CompositionalEmbeddingCollection
from torchrec_qr.modules.table import CompositionalTable, init_tables


def check_kept_optimizer(found: FoundCollection, table: str, fits: bool) -> None:
    """Checks the parameter of a table that becomes compositional.

    Args:
        found (FoundCollection): the collection.
        table (str): the name of the table.
        fits (bool): whether the partitions are fitted to the parameter.

    Raises:
        ValueError: the parameter is frozen and the partitions would be random, it has no values to fit, or its
            optimizer in backward was not attached by ``apply_optimizer_in_backward``.
    """
    weight, name = found.weight(table), found.named(table)
    on_meta = weight.device.type == "meta"
    if fits and on_meta:
        raise ValueError(f"compress_: {name} is on the meta device, and fit=True needs its values; allowed: fit=False")
    if not weight.requires_grad and not fits and not on_meta:
        raise ValueError(
            f"compress_: {name} is frozen (requires_grad=False), and its partitions would stay random; allowed: "
            f"fit=True, tables={{{table!r}: None}}, or requires_grad_(True) before"
        )
    attached = [type(optimizer) for optimizer in getattr(weight, "_in_backward_optimizers", [])]
    if attached != getattr(weight, "_optimizer_classes", []):
        raise ValueError(
            f"compress_: {name} has the optimizers in backward {[c.__name__ for c in attached]}; allowed: those that "
            "apply_optimizer_in_backward attaches, which can be attached to the partitions too. Wrap them afterwards"
        )


def replacement_of(
    found: FoundCollection, configs: Sequence[BaseEmbeddingConfig], fits: Mapping[str, Fit]
) -> nn.Module:
    """Returns a collection of other configs with the same parameters of the tables that stay plain.

    Args:
        found (FoundCollection): TorchRec's collection.
        configs (Sequence[BaseEmbeddingConfig]): of all tables, in its order.
        fits (Mapping[str, Fit]): the fitted partitions by table. Others are drawn.
    """
    given: dict[str, Any] = {"tables": list(configs), "device": torch.device("meta")}
    new: Any
    if found.is_pooled:
        new = CompositionalEmbeddingBagCollection(**given, is_weighted=found.module.is_weighted())
        tables = new.embedding_bags
    else:
        # TorchRec 1.6 lacks the last option.
        per_sharding = getattr(found.module, "use_gather_select_per_sharding", lambda: None)()
        new = CompositionalEmbeddingCollection(
            **given,
            need_indices=found.module.need_indices(),
            use_gather_select=found.module.use_gather_select(),
            use_gather_select_per_sharding=per_sharding,
        )
        tables = new.embeddings
    for config in configs:
        weight, table = found.weight(config.name), tables[config.name]
        if not is_compositional(config):
            table.weight = weight
            table.begin(config)
            continue
        if not weight.is_meta:
            table.to_empty(device=weight.device)
            for partition in table.children():
                partition.on_meta = ()
        if config.name in fits:
            with torch.no_grad():
                for parameter, rows in zip(table.weights(), fits[config.name].rows, strict=True):
                    parameter.copy_(rows)
        else:
            init_tables(table)
        _train_as(table, weight)
    new.has_fitted_values = bool(fits)
    new.train(found.module.training)
    replacement: nn.Module = new
    return replacement


def _train_as(table: CompositionalTable, weight: nn.Parameter) -> None:
    """Attaches the optimizers in backward of a full table to its partitions, and freezes them if it is frozen."""
    for optimizer, kwargs in zip(
        getattr(weight, "_in_backward_optimizers", []), getattr(weight, "_optimizer_kwargs", []), strict=True
    ):
        # Take what has changed since, such as the learning rate.
        group, defaults = optimizer.param_groups[0], optimizer.defaults
        now = {
            name: group[name]
            for name in defaults
            if name in group and (name in kwargs or group[name] != defaults[name])
        }
        _apply_optimizer_in_backward(type(optimizer), table.weights(), {**kwargs, **now})
    table.requires_grad_(weight.requires_grad)
