"""The lookup of one shard of one compositional table."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from torchrec_qr.distributed.codes import RowCode
from torchrec_qr.distributed.optimizer import RowOptimizer
from torchrec_qr.distributed.placement import compositional, logical_shards, position_of
from torchrec_qr.distributed.shards import ROW_SPLIT, block_rows, num_row_blocks, stored_columns
from torchrec_qr.ops import cpu
from torchrec_qr.ops.compositional_bag import Composition, compositional_bag, compositional_embedding
from torchrec_qr.ops.layout import TableLayout, partition_layouts
from torchrec_qr.ops.read_rows import RowGradients
from torchrec_qr.partitions.class_map import class_map_on


class ReplicatedPartitions(NamedTuple):
    """Those that every rank holds whole, by table and number.

    ``weights``: as tensors of the step's graph. ``touched``: see `torchrec_qr.distributed.lookup.Replicas`.
    """

    weights: dict[tuple[str, int], Tensor]
    touched: dict[tuple[str, int], Tensor]


class LocalShard(nn.Module):
    """One shard of one logical table: ids, or their row codes, to embeddings of the shard's columns."""

    class_map: Tensor | None

    def __init__(
        self,
        table: ShardedEmbeddingTable,
        stored: dict[int, Callable[[], Tensor]],
        optimizer: RowOptimizer | None,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        config, sharding_type = compositional(table).config, compositional(table).sharding_type
        self._config = config
        self._partitions = config.bound_partitions
        self.num_features = len(table.feature_names)
        self._composition = Composition(config.operation, config.path_hidden, config.path_activation)
        self._stored = stored
        # Of what is stored here, if that is stepped in backward.
        self._optimizer = optimizer
        start = table.local_metadata.shard_offsets[1] if table.local_metadata is not None else 0
        columns = {j: stored_columns(config, j, start, start + table.local_cols) for j in range(config.num_partitions)}
        self._columns = {j: (a, b) for j, (a, b) in columns.items() if a < b}
        self._code = RowCode(config) if sharding_type in ROW_SPLIT else None
        self._first_row = 0
        if self._code is not None:
            blocks = num_row_blocks(logical_shards(table))
            self._first_row = position_of(table) % blocks * block_rows(config, blocks)
        # No buffer: `DistributedDataParallel` sends the buffers of a module to all ranks at every forward.
        self.class_map = class_map_on(config.bound_partitions, device)
        self.name = config.name
        self.layout = self._as_layout()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "LocalShard":
        super()._apply(fn, recurse)
        if self.class_map is not None:
            self.class_map = class_map_on(self._partitions, fn(self.class_map.new_empty(0)).device)
        return self

    def embed(self, ids: Tensor, replicas: ReplicatedPartitions) -> Tensor:
        """(N,) → (N, D of this shard), in PyTorch."""
        rows = self._rows(ids)
        weights = self._marking(self.weights(replicas), rows, replicas)
        return compositional_embedding(self._composition, weights, rows, self._into())

    def sum(self, ids: Tensor, offsets: Tensor, weights: Tensor | None, replicas: ReplicatedPartitions) -> Tensor:
        """(N,) → (B, D of this shard), in PyTorch."""
        rows = self._rows(ids)
        stored = self._marking(self.weights(replicas), rows, replicas)
        return compositional_bag(self._composition, stored, rows, offsets, weights, self._into())

    def uses(self) -> set[tuple[str, int]]:
        """The partitions that this shard's output depends on."""
        return {(self._config.name, j) for j in self._columns}

    def _rows(self, ids: Tensor) -> list[Tensor]:
        if self._code is not None:
            ids = self._code.decode(ids, self._first_row)
        rows = self._partitions.class_rows(ids, self.class_map)
        base = self._config.base_partition
        return [rows[j] - self._first_row if j == base else rows[j] for j in self._columns]

    def weights(self, replicas: ReplicatedPartitions) -> list[Tensor]:
        """The partitions that the output depends on, those columns of them that this shard has."""
        out = []
        for j, (a, b) in self._columns.items():
            if j in self._stored:
                out.append(self._stored[j]())
            else:
                whole = replicas.weights[self._config.name, j]
                # Not a slice of all columns, whose gradient would be copied.
                out.append(whole if b - a == whole.shape[1] else whole[:, a:b])
        return out

    def steps(self) -> list[tuple[RowOptimizer, Tensor] | None]:
        """Per weight, what steps it in backward, and as which tensor; None: it has a gradient instead."""
        return [
            (self._optimizer, self._stored[j]()) if self._optimizer is not None and j in self._stored else None
            for j in self._columns
        ]

    def touched(self, replicas: ReplicatedPartitions) -> list[Tensor | None]:
        """Per weight, where to mark the rows that were looked up."""
        return [replicas.touched.get((self._config.name, j)) for j in self._columns]

    def _as_layout(self) -> TableLayout | None:
        """How the kernels see the shard; None: they do not have it."""
        config = self._config
        widths = {j: b - a for j, (a, b) in self._columns.items()}
        if not cpu.supports(config.operation, list(widths.values())):
            return None
        any_id = config.out_of_range == "unchecked" and self.class_map is None
        return TableLayout(
            config.operation,
            partition_layouts(self._partitions, widths, {config.base_partition: self._first_row}),
            self.num_features,
            num_ids=-1 if any_id else config.num_embeddings,
            code=None if self._code is None else self._code.layout(self._first_row),
        )

    def _marking(self, weights: list[Tensor], rows: list[Tensor], replicas: ReplicatedPartitions) -> list[Tensor]:
        marking = []
        for weight, row, touched in zip(weights, rows, self.touched(replicas), strict=True):
            if touched is not None and weight.requires_grad:
                weight = weight.view_as(weight)
                weight.register_hook(partial(_mark, touched, row))
            marking.append(weight)
        return marking

    def _into(self) -> list[RowGradients | None]:
        """Per weight, what takes its gradients if its rows are stepped in backward."""
        optimizer = self._optimizer
        return [
            optimizer.gradients_of(self._stored[j]()) if optimizer is not None and j in self._stored else None
            for j in self._columns
        ]


def _mark(touched: Tensor, rows: Tensor, grad: Tensor) -> None:
    touched.index_fill_(0, rows, 1)
