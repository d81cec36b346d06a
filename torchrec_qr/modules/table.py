"""The tables of a collection, plain and compositional."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from torchrec_qr.configs import DTYPES, POOLINGS, CompositionalConfig, InitFn, check_allowed, is_compositional
from torchrec_qr.fingerprint import check_form, check_row_types, check_saved_tables, fingerprint
from torchrec_qr.init import partition_configs
from torchrec_qr.modules.attached_optimizers import refuse_lost_optimizer
from torchrec_qr.ops.description import CodeLayout, PartitionLayout, TableLayout
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.partitions.class_map import class_map_on


class _Table:
    """A module with a parameter that `reset_parameters` draws by the table's config.

    ``DistributedModelParallel`` calls that method after it moves a module from the meta device, unless the module is
    sharded. torch's own method of a plain table draws N(0, 1).
    """

    __jit_ignored_attributes__: ClassVar[list[str]] = ["init_fn", "layout", "on_meta"]
    init_fn: InitFn | None = None
    # The name of the table or partition, and its parameter if it was built on the meta device. The parameter is in a
    # tuple, because nn.Module would register it.
    name: str
    on_meta: tuple[nn.Parameter, ...] = ()

    def begin(self, config: BaseEmbeddingConfig) -> None:
        """Sets what the table takes from its config, and remembers a parameter on the meta device."""
        self.name, self.init_fn = config.name, config.init_fn
        weight = _weight(cast(nn.Module, self))
        self.on_meta = (weight,) if weight.is_meta else ()

    def reset_parameters(self) -> None:
        if self.init_fn is not None:  # torch's constructors call this before it is set
            weight = _weight(cast(nn.Module, self))
            refuse_lost_optimizer(self.name, weight, *self.on_meta or (None,))
            self.init_fn(weight)


class _PlainTable(_Table):
    layout: TableLayout
    class_map: Tensor | None = None

    def weights(self) -> list[nn.Parameter]:
        """Returns the parameter of the table."""
        return [_weight(cast(nn.Module, self))]

    @torch.jit.export
    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the parameter of the table, and no class map."""
        return [self.weight], []  # type: ignore[attr-defined]


class PlainEmbeddingBag(_PlainTable, nn.EmbeddingBag):
    """A plain table of a bag collection."""


class PlainEmbedding(_PlainTable, nn.Embedding):
    """A plain table of a collection without pooling."""


class _Partition(_Table, nn.Module):
    def __init__(self, config: BaseEmbeddingConfig, device: torch.device) -> None:
        super().__init__()
        shape = (config.num_embeddings, config.embedding_dim)
        self.weight = nn.Parameter(torch.empty(shape, dtype=DTYPES[config.data_type], device=device))
        self.begin(config)


class CompositionalTable(nn.Module):
    """The K partitions of one table, each a parameter ``partition_<j>.weight`` (|P_j|, D_j).

    Its ``state_dict`` also has the ``fingerprint``: see `torchrec_qr.fingerprint`. `build_tables` refuses to load
    another one. A class map moves with the parameters to their device, and the ``state_dict`` does not have it.
    """

    fingerprint: Tensor
    class_map: Tensor | None

    def __init__(self, config: CompositionalConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self._partitions = config.bound_partitions
        for j, partition in enumerate(partition_configs(config)):
            self.add_module(f"partition_{j}", _Partition(partition, device))
        self.layout = table_layout(config, dict(enumerate(config.partition_columns)))
        self.register_buffer("fingerprint", None)
        self.set_constants(device)
        # Restore constants, because `load_state_dict(assign=True)` moves parameters from the meta device one by one.
        self.register_load_state_dict_post_hook(_restore_constants)

    def weights(self) -> list[nn.Parameter]:
        """Returns the K parameters, in the order of the partitions."""
        return [_weight(getattr(self, f"partition_{j}")) for j in range(self._partitions.num_partitions)]

    @torch.jit.export
    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the K parameters, and the class map if there is one."""
        weights: list[Tensor] = []
        for partition in self.children():
            weights.append(partition.weight)  # type: ignore[arg-type]
        class_map = self.class_map
        return weights, [] if class_map is None else [class_map]

    def set_constants(self, device: torch.device) -> None:
        """Makes the fingerprint and the class map anew, which depend on the config and the device alone."""
        self.fingerprint = fingerprint(self.config).to(device)
        # Register no buffer, because `DistributedDataParallel` sends buffers to all ranks at every forward.
        self.class_map = class_map_on(self._partitions, device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "CompositionalTable":
        super()._apply(fn, recurse)
        # Make constants anew, because `to_empty` of a module on the meta device loses their values.
        self.set_constants(device_of(self))
        return self


Table = CompositionalTable | PlainEmbeddingBag | PlainEmbedding


def table_layout(
    config: CompositionalConfig,
    columns: Mapping[int, int],
    first_rows: Mapping[int, int] | None = None,
    num_features: int = 1,
    code: CodeLayout | None = None,
) -> TableLayout:
    """Returns the layout of a compositional table in a lookup.

    Args:
        config (CompositionalConfig): the table.
        columns (Mapping[int, int]): the columns of the partitions that are looked up.
        first_rows (Mapping[int, int] | None): the first stored row of partitions, if it is not 0.
        num_features (int): the features of the lookup that use the table.
        code (CodeLayout | None): the row codes that travel, or None if ids do.
    """
    any_id = config.out_of_range == "unchecked" and config.bound_partitions.class_map is None
    return TableLayout(
        config.operation,
        partition_layouts(config.bound_partitions, columns, first_rows),
        num_features,
        num_ids=-1 if any_id else config.num_embeddings,
        code=code,
        path_hidden=config.path_hidden,
        path_activation=config.path_activation,
        hash_seed=config.seed_of_hash if code is None else None,
    )


def plain_layout(config: BaseEmbeddingConfig) -> TableLayout:
    """Returns the layout of a plain table in a lookup, whose rows are its ids."""
    return TableLayout("plain", (PartitionLayout(config.embedding_dim, divisor=1),), num_ids=config.num_embeddings)


def check_name(config: BaseEmbeddingConfig, modules: nn.ModuleDict) -> None:
    """Checks that a plain or compositional table can have its name beside the tables in ``modules``.

    Raises:
        ValueError: the name occurs twice, or torch refuses it for a module, as in TorchRec's collections.
    """
    name = config.name
    if isinstance(name, str) and name in modules:
        raise ValueError(f"table {name!r}: the name occurs twice; allowed: one table per name")
    if not isinstance(name, str) or not name or "." in name or hasattr(modules, name):
        raise ValueError(
            f"table {name!r}: torch refuses the name for a module, as in TorchRec; allowed: a string without a dot "
            "that is no attribute of torch.nn.ModuleDict"
        )


def build_tables(
    tables: Sequence[BaseEmbeddingConfig],
    plain: type[PlainEmbedding] | type[PlainEmbeddingBag],
    device: torch.device | None,
) -> nn.ModuleDict:
    """Returns a module per table, in order: a `CompositionalTable`, or ``plain`` for TorchRec's own configs.

    A table without ``feature_names`` has one feature of its own name, as in TorchRec. The result refuses a state dict
    with another fingerprint, or with a table in the other form, before it loads any table.

    Args:
        tables (Sequence[BaseEmbeddingConfig]): the tables.
        plain (type[PlainEmbedding] | type[PlainEmbeddingBag]): the module of a plain table.
        device (torch.device | None): the device of the parameters.

    Raises:
        TypeError: a config of bags in a collection of sequences, or the reverse.
        ValueError: a table name occurs twice or is none for a module, the name of an output occurs twice, a data type
            is none of FP32, FP16 and BF16, or a pooling is none of SUM and MEAN.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    modules = nn.ModuleDict()
    modules.register_load_state_dict_pre_hook(_refuse_other_meanings)
    of_bags = plain is PlainEmbeddingBag
    for config in tables:
        check_name(config, modules)
        if isinstance(config, EmbeddingBagConfig) != of_bags:
            allowed, kind = ("EmbeddingBagConfig", "bags") if of_bags else ("EmbeddingConfig", "sequences")
            raise TypeError(
                f"table {config.name!r}: {type(config).__name__} in a collection of {kind}; allowed: {allowed}, "
                f"Compositional{allowed}"
            )
        check_allowed(config, "data_type", tuple(DTYPES))
        config.feature_names = config.feature_names or [config.name]
        if is_compositional(config):
            modules[config.name] = CompositionalTable(config, device)
            continue
        as_torchrec: dict[str, Any] = {}
        if isinstance(config, EmbeddingBagConfig):
            check_allowed(config, "pooling", POOLINGS)
            as_torchrec = {"mode": config.pooling.value.lower(), "include_last_offset": True}
        # Draw no values of torch's own, so that a seed has the same values with and without the meta device.
        table = skip_init(
            plain,
            config.num_embeddings,
            config.embedding_dim,
            device=device,
            dtype=DTYPES[config.data_type],
            **as_torchrec,
        )
        table.begin(config)
        table.layout = plain_layout(config)
        modules[config.name] = table
    _check_outputs(tables)
    return modules


def _check_outputs(tables: Sequence[Any]) -> None:
    """Raises ValueError if two outputs have one name, because a feature has the name ``<feature>@<table>``."""
    outputs: dict[str, tuple[str, str]] = {}
    for config, names in zip(tables, get_embedding_names_by_table(list(tables)), strict=True):
        for feature, name in zip(config.feature_names, names, strict=True):
            table, other = outputs.setdefault(name, (config.name, feature))
            if (table, other) != (config.name, feature):
                raise ValueError(
                    f"table {config.name!r}: feature {feature!r} has the output {name!r}, as feature {other!r} of "
                    f"table {table!r} has; allowed: a name of its own for each output, which is <feature>@<table> for "
                    "a feature of several tables"
                )


def init_tables(tables: nn.Module) -> None:
    """Draws initial values, table by table and partition by partition, except on the meta device."""
    for table in tables.modules():
        if isinstance(table, _Table) and device_of(table).type != "meta":
            table.reset_parameters()


def stored_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter | None]]:
    """Yields, for each plain table and partition, its name, its parameter, and that on the meta device if one was."""
    for table in module.modules():
        if isinstance(table, _Table):
            yield table.name, _weight(table), next(iter(table.on_meta), None)


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's first parameter, or the CPU if there is none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _weight(module: nn.Module) -> nn.Parameter:
    # Do not call `get_parameter`, because it checks the type, and the proxies of `torch.fx` are no parameters.
    return cast(nn.Parameter, module.weight)


def _refuse_other_meanings(tables: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    for name, table in tables.named_children():
        check_form(state_dict, f"{prefix}{name}", isinstance(table, CompositionalTable))
        check_row_types(state_dict, f"{prefix}{name}", quantised=False)
    compositional = (t for t in tables.children() if isinstance(t, CompositionalTable))
    check_saved_tables(state_dict, prefix, ((t.config, t.fingerprint) for t in compositional))


def _restore_constants(table: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(table, CompositionalTable)
    table.set_constants(device_of(table))
