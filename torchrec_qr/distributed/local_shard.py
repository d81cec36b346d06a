"""One shard of one compositional table: the layout of its lookup, its weights, and what steps them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.distributed.codes import RowCode
from torchrec_qr.distributed.optimizer import RowOptimizer
from torchrec_qr.distributed.placement import compositional, logical_shards, position_of
from torchrec_qr.distributed.shards import ROW_SPLIT, block_rows, num_row_blocks, stored_columns
from torchrec_qr.ops.arguments import DenseGradient, Outcome
from torchrec_qr.ops.description import TableLayout
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.ops.update_rules import Update
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
        self._config = config = compositional(table).config
        self._stored = stored
        # Of what is stored here, if that is stepped in backward.
        self._optimizer = optimizer
        start = table.local_metadata.shard_offsets[1] if table.local_metadata is not None else 0
        columns = {j: stored_columns(config, j, start, start + table.local_cols) for j in range(config.num_partitions)}
        self._columns = {j: (a, b) for j, (a, b) in columns.items() if a < b}
        # No buffer: `DistributedDataParallel` sends the buffers of a module to all ranks at every forward.
        self.class_map = class_map_on(config.bound_partitions, device)
        self.name = config.name
        self.layout = _layout(table, config, {j: b - a for j, (a, b) in self._columns.items()})

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "LocalShard":
        super()._apply(fn, recurse)
        if self.class_map is not None:
            self.class_map = class_map_on(self._config.bound_partitions, fn(self.class_map.new_empty(0)).device)
        return self

    def uses(self) -> set[tuple[str, int]]:
        """The partitions that this shard's output depends on."""
        return {(self._config.name, j) for j in self._columns}

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

    def outcomes(
        self, replicas: ReplicatedPartitions, step: Callable[[RowOptimizer, Tensor], Update | None]
    ) -> list[Outcome]:
        """Returns, per weight, what ``step`` makes of a stored one that is stepped in backward, else its gradient."""
        out: list[Outcome] = []
        for j in self._columns:
            if self._optimizer is not None and j in self._stored:
                out.append(step(self._optimizer, self._stored[j]()))
            else:
                out.append(DenseGradient(replicas.touched.get((self._config.name, j))))
        return out


def _layout(table: ShardedEmbeddingTable, config: CompositionalConfig, widths: dict[int, int]) -> TableLayout:
    code, first_row = None, 0
    if compositional(table).sharding_type in ROW_SPLIT:
        blocks = num_row_blocks(logical_shards(table))
        first_row = position_of(table) % blocks * block_rows(config, blocks)
        code = RowCode(config).layout(first_row)
    any_id = config.out_of_range == "unchecked" and config.bound_partitions.class_map is None
    return TableLayout(
        config.operation,
        partition_layouts(config.bound_partitions, widths, {config.base_partition: first_row}),
        len(table.feature_names),
        num_ids=-1 if any_id else config.num_embeddings,
        code=code,
        path_hidden=config.path_hidden,
        path_activation=config.path_activation,
    )
