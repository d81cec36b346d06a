"""The partitions of a served table as buffers of stored rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, PoolingType

from torchrec_qr.configs import is_compositional
from torchrec_qr.fingerprint import check_row_types, check_saved_tables, fingerprint
from torchrec_qr.ids import IdSpace, bounded_ids
from torchrec_qr.modules.table import check_name, plain_layout, table_layout
from torchrec_qr.ops.backends.torch import combined
from torchrec_qr.ops.path import apply_class_mlps
from torchrec_qr.ops.served_operators import ServedTable
from torchrec_qr.partitions.class_map import class_map_on
from torchrec_qr.quant.row_storage import no_rows, read_stored, row_type_of, stored_rows


class Held:
    """Buffers of modules, whatever the modules hold at the time.

    Lookups read them here rather than as attributes, because at a batch of one sample attributes take longer than all
    else. Whatever replaces a buffer does so in the dict that this reads.

    Args:
        buffers (Iterable[tuple[nn.Module, str]]): modules, and the names of their buffers.
    """

    def __init__(self, buffers: Iterable[tuple[nn.Module, str]]) -> None:
        self._of_modules = [(module._buffers, name) for module, name in buffers]

    def tensors(self) -> list[Tensor]:
        """Returns the buffers, in order."""
        return cast(list[Tensor], [buffers[name] for buffers, name in self._of_modules])


class _StoredRows(nn.Module):
    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


class QuantisedTable(nn.Module):
    """One table, plain or compositional, whose rows have the ``data_type`` of its config.

    Buffers have the names of the float table's parameters: ``weight``, or ``partition_<j>.weight``. A row of bytes has
    its values first, then scale and bias. The ``state_dict`` of a compositional table has its ``fingerprint`` too.

    Args:
        config (BaseEmbeddingConfig): the table. Its ``data_type`` is that of all rows.
        device (torch.device): of the buffers, which are zeros.

    Raises:
        NotImplementedError: no rows have the ``data_type``.
    """

    fingerprint: Tensor
    class_map: Tensor | None

    def __init__(self, config: BaseEmbeddingConfig, device: torch.device) -> None:
        super().__init__()
        self.config, self.row_type = config, row_type_of(config)
        if is_compositional(config):
            self.layout = table_layout(config, dict(enumerate(config.partition_columns)))
            sizes: Sequence[int] = config.bound_partitions.sizes
            for j, (rows, columns) in enumerate(zip(sizes, self.layout.widths, strict=True)):
                self.add_module(f"partition_{j}", _StoredRows(no_rows(rows, columns, config.data_type, device)))
            self.register_buffer("fingerprint", None)
        else:
            self.layout = plain_layout(config)
            weight = no_rows(config.num_embeddings, config.embedding_dim, config.data_type, device)
            self.register_buffer("weight", weight)
        self.register_buffer("class_map", None, persistent=False)
        self._set_constants(device)
        # Restore constants, because `load_state_dict(assign=True)` moves buffers from the meta device one by one.
        self.register_load_state_dict_post_hook(_restore_constants)

    @property
    def is_served(self) -> bool:
        """Whether the operators have such a table. PyTorch looks up ``path``, and five or more partitions."""
        return self.layout.is_served

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.weights()[0].device

    def weights(self) -> list[Tensor]:
        """Returns the stored rows of each partition, in order."""
        return [holder.weight for holder in self._holders()]

    def rows(self) -> list[tuple[nn.Module, str]]:
        """Returns the module that holds the rows of each partition, and the name of the buffer."""
        return [(holder, "weight") for holder in self._holders()]

    def maps(self) -> list[tuple[nn.Module, str]]:
        """Returns the module that holds the class map, and the name of the buffer, if there is one."""
        return [] if self.class_map is None else [(self, "class_map")]

    def store(self, weights: Iterable[Tensor]) -> None:
        """Stores rows of floats, one (|P_j|, D_j) for each partition.

        Raises:
            ValueError: see `torchrec_qr.quant.row_storage.stored_rows`.
        """
        for j, (holder, weight) in enumerate(zip(self._holders(), weights, strict=True)):
            holder.weight = stored_rows(weight, self.config.data_type, f"table {self.config.name!r}, partition {j}")

    def served(self, features: Sequence[str]) -> ServedTable:
        """Returns what the operators read of the table for some of its features."""
        return ServedTable(
            self.config.name,
            tuple(features),
            self.layout,
            self.config.num_embeddings,
            self.out_of_range,
            self.is_mean,
            (self.row_type,) * len(self.layout.partitions),
        )

    @property
    def is_mean(self) -> bool:
        """Whether the pooling is MEAN."""
        return getattr(self.config, "pooling", None) == PoolingType.MEAN

    @property
    def out_of_range(self) -> str:
        """The policy for ids outside [0, S). That of plain tables is ``"error"``."""
        return getattr(self.config, "id_policy", "error")

    def bounded(self, ids: Tensor, feature: str) -> Tensor:
        """Returns the ids of a feature in [0, S): see `torchrec_qr.ids.bounded_ids`."""
        return bounded_ids(ids, IdSpace(self.config.name, feature, self.config.num_embeddings, self.out_of_range))

    def composed(self, ids: Tensor) -> Tensor:
        """Returns (N, D) fp32 of ids (N,) int64, which are in [0, S) or are hashed, in PyTorch."""
        weights, ids = self.weights(), self.layout.ids_of(ids)
        rows = [partition.rows_of(ids, self.class_map) for partition in self.layout.partitions]
        if self.layout.operation != "path":
            parts = [self._read(weight, of, j) for j, (weight, of) in enumerate(zip(weights, rows, strict=True))]
            return combined(self.layout.operation, parts)
        out = self._read(weights[0], rows[0], 0)
        for j in range(1, len(weights)):
            classes, numbers = rows[j].unique(return_inverse=True)
            mlps = self._read(weights[j], classes, j)
            out = apply_class_mlps(out, mlps, numbers, self.layout.path_hidden, self.layout.path_activation)
        return out

    def _read(self, weight: Tensor, rows: Tensor, j: int) -> Tensor:
        return read_stored(weight.index_select(0, rows), self.layout.widths[j], self.config.data_type)

    def _holders(self) -> list[_StoredRows]:
        if not is_compositional(self.config):
            return [cast(_StoredRows, self)]
        return [cast(_StoredRows, getattr(self, f"partition_{j}")) for j in range(len(self.layout.partitions))]

    def _set_constants(self, device: torch.device) -> None:
        if is_compositional(self.config):
            self.fingerprint = fingerprint(self.config).to(device)
            self.class_map = class_map_on(self.config.bound_partitions, device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantisedTable":
        super()._apply(fn, recurse)
        # Make constants anew, because `to_empty` of a module on the meta device loses their values.
        self._set_constants(self.device)
        return self


def quantised_tables(tables: Sequence[BaseEmbeddingConfig], device: torch.device | None) -> nn.ModuleDict:
    """Returns a `QuantisedTable` per table, in order. A state dict with another fingerprint is refused.

    Args:
        tables (Sequence[BaseEmbeddingConfig]): the tables.
        device (torch.device | None): of the buffers.

    Raises:
        ValueError: a table name occurs twice, or is none for a module.
        NotImplementedError: see `QuantisedTable`.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    modules = nn.ModuleDict()
    modules.register_load_state_dict_pre_hook(_refuse_other_meanings)
    for config in tables:
        check_name(config, modules)
        config.feature_names = config.feature_names or [config.name]
        modules[config.name] = QuantisedTable(config, device)
    return modules


def _refuse_other_meanings(tables: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    own = [t for t in tables.children() if isinstance(t, QuantisedTable)]
    for table in own:
        check_row_types(state_dict, f"{prefix}{table.config.name}", table.weights()[0].dtype == torch.uint8)
    check_saved_tables(state_dict, prefix, ((t.config, t.fingerprint) for t in own if is_compositional(t.config)))


def _restore_constants(table: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(table, QuantisedTable)
    table._set_constants(table.device)
