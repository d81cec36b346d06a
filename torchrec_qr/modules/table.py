"""The tables of a collection: parameters of compositional ones, and the lookup of one feature in either kind."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType

from torchrec_qr.configs import (
    DTYPES,
    CompositionalConfig,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    InitFn,
)
from torchrec_qr.fingerprint import check_saved_tables, fingerprint
from torchrec_qr.ids import IdSpace
from torchrec_qr.init import partition_configs
from torchrec_qr.ops.arguments import Batch
from torchrec_qr.ops.description import Description, PartitionLayout, TableLayout
from torchrec_qr.ops.lookup import look_up
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.partitions.class_map import class_map_on


class _Table:
    """What ``DistributedModelParallel`` asks a module for that holds parameters, has left the meta device and is not
    sharded: `reset_parameters`, here by the config. Without it they are whatever lay in memory; torch's own draws
    N(0, 1) for a plain table.
    """

    init_fn: InitFn | None = None
    description: Description

    def reset_parameters(self) -> None:
        if self.init_fn is not None:  # which torch's constructors do not know of
            self.init_fn(_weight(cast(nn.Module, self)))


class PlainEmbeddingBag(_Table, nn.EmbeddingBag):
    """A plain table of a bag collection."""


class PlainEmbedding(_Table, nn.Embedding):
    """A plain table of a collection of sequences."""


class _Partition(_Table, nn.Module):
    def __init__(self, config: BaseEmbeddingConfig, device: torch.device) -> None:
        super().__init__()
        shape = (config.num_embeddings, config.embedding_dim)
        self.weight = nn.Parameter(torch.empty(shape, dtype=DTYPES[config.data_type], device=device))
        self.init_fn = config.init_fn


class CompositionalTable(nn.Module):
    """The K partitions of one table, each a real parameter ``partition_<j>.weight`` (|P_j|, columns of partition j).

    Its ``state_dict`` also holds ``fingerprint`` (see `torchrec_qr.fingerprint`); `build_tables` refuses to load that
    of another meaning. An explicit map follows the parameters to their device, and is no part of the ``state_dict``.
    """

    fingerprint: Tensor
    description: Description

    def __init__(self, config: CompositionalConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self._partitions = config.bound_partitions
        for j, partition in enumerate(partition_configs(config)):
            self.add_module(f"partition_{j}", _Partition(partition, device))
        self.register_buffer("fingerprint", None)
        self.set_constants(device)
        # After `load_state_dict(assign=True)`, which takes parameters off the meta device one by one.
        self.register_load_state_dict_post_hook(_restore_constants)

    def weights(self) -> list[nn.Parameter]:
        """Returns the K parameters, in the order of the partitions."""
        return [_weight(getattr(self, f"partition_{j}")) for j in range(self._partitions.num_partitions)]

    def set_constants(self, device: torch.device) -> None:
        """Makes anew what follows from the config alone: fingerprint and description, with its explicit map."""
        self.fingerprint = fingerprint(self.config).to(device)
        # No buffer: `DistributedDataParallel` sends the buffers of a module to all ranks at every forward.
        class_map = class_map_on(self._partitions, device)
        self.description = Description(
            [_layout(self.config)], [self.config.name], [] if class_map is None else [class_map]
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "CompositionalTable":
        super()._apply(fn, recurse)
        # Constants follow from the config: `to_empty`, with which meta modules are materialised, would lose them.
        self.set_constants(device_of(self))
        return self


def _layout(config: CompositionalConfig) -> TableLayout:
    any_id = config.out_of_range == "unchecked" and config.bound_partitions.class_map is None
    return TableLayout(
        config.operation,
        partition_layouts(config.bound_partitions, dict(enumerate(config.partition_columns))),
        num_ids=-1 if any_id else config.num_embeddings,
        path_hidden=config.path_hidden,
        path_activation=config.path_activation,
    )


def build_tables(
    tables: Sequence[BaseEmbeddingConfig],
    plain: type[PlainEmbedding] | type[PlainEmbeddingBag],
    device: torch.device | None,
) -> nn.ModuleDict:
    """Returns a module per table, in order: a `CompositionalTable`, or ``plain`` for TorchRec's own configs.

    As TorchRec, names a table's only feature after the table where ``feature_names`` is empty. Loading a state dict
    with a table of another meaning raises before any table is loaded.

    Raises:
        ValueError: a table name that occurs twice; a data type that is none of FP32, FP16 and BF16; a pooling that is
            none of SUM and MEAN.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    modules = nn.ModuleDict()
    modules.register_load_state_dict_pre_hook(_refuse_other_meanings)
    for config in tables:
        if config.name in modules:
            raise ValueError(f"table {config.name!r}: the name occurs twice; allowed: one table per name")
        _check_allowed(config, "data_type", tuple(DTYPES))
        config.feature_names = config.feature_names or [config.name]
        if isinstance(config, CompositionalEmbeddingBagConfig | CompositionalEmbeddingConfig):
            modules[config.name] = CompositionalTable(config, device)
            continue
        as_torchrec: dict[str, Any] = {}
        if isinstance(config, EmbeddingBagConfig):
            _check_allowed(config, "pooling", (PoolingType.SUM, PoolingType.MEAN))
            as_torchrec = {"mode": config.pooling.value.lower(), "include_last_offset": True}
        # torch's own initial values are not drawn, so that a seed gives the same ones on the meta device and off it.
        table = skip_init(
            plain,
            config.num_embeddings,
            config.embedding_dim,
            device=device,
            dtype=DTYPES[config.data_type],
            **as_torchrec,
        )
        table.init_fn = config.init_fn
        rows_are_ids = PartitionLayout(config.embedding_dim, divisor=1)
        layout = TableLayout("plain", (rows_are_ids,), num_ids=config.num_embeddings)
        table.description = Description([layout], [config.name])
        modules[config.name] = table
    return modules


def _check_allowed(config: BaseEmbeddingConfig, field: str, allowed: tuple[Enum, ...]) -> None:
    if getattr(config, field) not in allowed:
        names = ", ".join(str(a) for a in allowed)
        raise ValueError(f"table {config.name!r}: {field}={getattr(config, field)!r}; allowed: {names}")


def id_spaces(tables: Sequence[BaseEmbeddingConfig]) -> list[IdSpace]:
    """Returns the id space of every feature of every table, in order; plain tables take ``"error"``."""
    return [
        IdSpace(t.name, feature, t.num_embeddings, getattr(t, "out_of_range", "error"))
        for t in tables
        for feature in t.feature_names
    ]


def init_tables(tables: nn.Module) -> None:
    """Draws initial values, table after table and partition after partition; none on the meta device."""
    for table in tables.modules():
        if isinstance(table, _Table) and device_of(table).type != "meta":
            table.reset_parameters()


def embed(table: nn.Module, ids: Tensor) -> Tensor:
    """Returns (N, D) fp32: the embedding of each id (N,) in a table of either kind."""
    tables, weights = _described(table)
    # All fields, here and below, because the compiler of torch 2.11 loses the defaults of named tuples.
    return look_up(tables, weights, Batch(ids, None, None, False, None, None)).view(-1, tables.columns)


def sum_bags_of(table: nn.Module, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """Returns (B, D) fp32: per bag, the weighted sum of its ids' embeddings in a table of either kind."""
    return look_up(*_described(table), Batch(ids, offsets, weights, True, None, None))


def _described(table: nn.Module) -> tuple[Description, list[Tensor]]:
    if isinstance(table, CompositionalTable):
        return table.description, list(table.weights())
    return cast(_Table, table).description, [_weight(table)]


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's first parameter; the CPU where it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _weight(module: nn.Module) -> nn.Parameter:
    # Not `get_parameter`, which looks at the type: `torch.fx` traces attributes, and its proxies are no parameters.
    return cast(nn.Parameter, module.weight)


def _refuse_other_meanings(tables: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    compositional = (t for t in tables.children() if isinstance(t, CompositionalTable))
    check_saved_tables(state_dict, prefix, ((t.config, t.fingerprint) for t in compositional))


def _restore_constants(table: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(table, CompositionalTable)
    table.set_constants(device_of(table))


# Recorded as a call by `torch.fx`: which backend runs follows from the device, at run time.
torch.fx.wrap("look_up")
