"""The lookup of compositional tables on the ranks that own them, and the parameters behind it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.configs import DTYPES, CompositionalConfig
from torchrec_qr.distributed.codes import RowCode
from torchrec_qr.distributed.optimizer import RowOptimizer, StoredPartition, step_in_backward
from torchrec_qr.distributed.shards import (
    ROW_SPLIT,
    block_rows,
    is_replicated,
    num_row_blocks,
    stored_columns,
    stored_shard,
    stored_shards,
)
from torchrec_qr.distributed.update_rules import says_something, update_rule
from torchrec_qr.ops.compositional_bag import Composition, compositional_bag, compositional_embedding


@dataclass(frozen=True)
class Placed:
    """A compositional table and its sharding type: what TorchRec's own description of a shard has no field for."""

    config: CompositionalConfig
    sharding_type: str


def placed(table: ShardedEmbeddingTable) -> Placed | None:
    """What `place` attached; None for a plain table."""
    return getattr(table, "compositional", None)


def place(table: ShardedEmbeddingTable, config: CompositionalConfig, sharding_type: str) -> None:
    """Attaches a `Placed`. TorchRec copies configs field by field, so it cannot travel in one of them."""
    table.compositional = Placed(config, sharding_type)  # type: ignore[attr-defined]


def is_fused(table: ShardedEmbeddingTable) -> bool:
    """Whether rows are stepped in backward: by the fused kernel, or because anything is said of the table's optimizer.

    TorchRec's dense kernel, which is the one it has for data-parallel, would drop an attached optimizer in silence.
    """
    attached = any(says_something(key, value) for key, value in (table.fused_params or {}).items())
    return table.compute_kernel == EmbeddingComputeKernel.FUSED or attached


class FusedOptimizerHolder(nn.Module, FusedOptimizerModule):
    """Where TorchRec, which walks the modules of a lookup, finds the optimizer of one table."""

    def __init__(self, optimizer: RowOptimizer) -> None:
        super().__init__()
        self._optimizer = optimizer

    @property
    def fused_optimizer(self) -> RowOptimizer:
        return self._optimizer


class Replicas(nn.Module):
    """Partitions that every rank holds whole, as parameters for `DistributedDataParallel` to reduce.

    Args:
        tables: the tables of one sharding type, of all ranks, so that all ranks hold and reduce the same parameters.
    """

    def __init__(self, tables: Sequence[ShardedEmbeddingTable], device: torch.device | None) -> None:
        super().__init__()
        self.parameters_of: dict[tuple[str, int], nn.Parameter] = {}
        self.optimizer_of: dict[Tensor, RowOptimizer] = {}
        self._names: dict[nn.Parameter, str] = {}
        # Of the gradients of parameters that nothing steps in backward; set by `replication.replicate`.
        self.gradient_scale = 1.0
        holders = []
        for table in tables:
            config, sharding_type = _placed(table).config, _placed(table).sharding_type
            assert config.partitions is not None
            stored: list[StoredPartition] = []
            for j, rows in enumerate(config.partitions.sizes):
                if not is_replicated(config, j, sharding_type):
                    continue
                size = (rows, config.partition_columns[j])
                p = nn.Parameter(torch.zeros(size, dtype=DTYPES[config.partition_data_types[j]], device=device))
                self.parameters_of[config.name, j] = p
                self._names[p] = f"{config.name}.partition_{j}"
                stored.append(StoredPartition(self._names[p], size, [p]))
            if is_fused(table) and stored:
                optimizer = RowOptimizer(stored, update_rule(table.name, table.fused_params or {}), pg=None)
                holders.append(FusedOptimizerHolder(optimizer))
                self.optimizer_of.update((p, optimizer) for partition in stored for p in partition.tensors)
        self.weights = nn.ParameterList(self.parameters_of.values())
        self.optimizers = nn.ModuleList(holders)

    def forward(self) -> list[Tensor]:
        """Returns the parameters as tensors of this step's graph: DDP reduces what is used of a module's outputs."""
        for p in self.optimizer_of:
            p.grad = None  # stepped in backward, so that nobody else clears it
        views = [p.view_as(p) for p in self.weights]
        if self.gradient_scale != 1.0:
            for p, view in zip(self.weights, views, strict=True):
                if view.requires_grad and p not in self.optimizer_of:
                    view.register_hook(self._scaled)
        return views

    def _scaled(self, grad: Tensor) -> Tensor:
        # Not in place: under ``add`` the sibling partitions have the same tensor as their gradient.
        return grad * self.gradient_scale

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        for p, name in self._names.items():
            optimizer = self.optimizer_of.get(p)
            # An alias, as TBE's are: DDP must not see the mark on a parameter that it manages.
            yield name, p if optimizer is None else _in_backward(p.data, optimizer)


class CompositionalKernel(BaseEmbedding):
    """Looks up a group of compositional shards: maps ids to rows, looks up, composes, and pools unless ``sequence``.

    Stores the partitions that are not replicated. Fused ones are leaves with sparse gradients that are stepped as
    soon as their gradient is complete; others are plain parameters.
    """

    def __init__(
        self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None, device: torch.device | None, sequence: bool
    ) -> None:
        super().__init__()
        self._config = config
        self._sequence = sequence
        self._pg = pg
        # Set by the lookup for every forward: the replicated partitions, as tensors of the step's graph.
        self.replicas: dict[tuple[str, int], Tensor] = {}
        self._stored: list[StoredPartition] = []
        self._exposed: list[tuple[str, nn.Parameter]] = []
        holders = []
        # All shards of a table follow each other nowhere in particular; TorchRec wants one parameter for them.
        by_name = sorted(config.embedding_tables, key=lambda t: t.name)
        leaves: dict[tuple[int, int], Callable[[], Tensor]] = {}
        for _, group in groupby(by_name, key=lambda t: t.name):
            tables = list(group)
            stored = self._store(tables, leaves, device)
            if not is_fused(tables[0]) or not stored:
                continue
            optimizer = RowOptimizer(stored, update_rule(tables[0].name, tables[0].fused_params or {}), pg)
            holders.append(FusedOptimizerHolder(optimizer))
            for partition in stored:
                for leaf in partition.tensors:
                    step_in_backward(leaf, optimizer)
            self._exposed = [
                (name, _in_backward(p.data, optimizer) if name in {s.name for s in stored} else p)
                for name, p in self._exposed
            ]
        self._shards = nn.ModuleList(
            LocalShard(t, {j: leaf for (table, j), leaf in leaves.items() if table == id(t)}, device)
            for t in config.embedding_tables
        )
        self.optimizers = nn.ModuleList(holders)
        self.dense = nn.ParameterList(p for _, p in self._exposed if not hasattr(p, "_in_backward_optimizers"))

    def _store(
        self,
        tables: list[ShardedEmbeddingTable],
        leaves: dict[tuple[int, int], Callable[[], Tensor]],
        device: torch.device | None,
    ) -> list[StoredPartition]:
        """Allocates this rank's shards of a table; those of one partition share a storage, which TorchRec is shown."""
        at = _placed(tables[0])
        config = at.config
        assert config.partitions is not None
        stored = []
        for j, rows in enumerate(config.partitions.sizes):
            if is_replicated(config, j, at.sharding_type):
                continue
            here = [(t, shard) for t in tables if (shard := _stored_shard(t, j)) is not None]
            if not here:
                continue
            sizes = [tuple(shard.shard_sizes) for _, shard in here]
            flat = torch.zeros(
                sum(a * b for a, b in sizes), dtype=DTYPES[config.partition_data_types[j]], device=device
            )
            exposed = nn.Parameter(flat.view(-1, sizes[0][1]) if len({b for _, b in sizes}) == 1 else flat)
            starts = [0, *accumulate(a * b for a, b in sizes)]
            pieces = [flat[start : start + a * b].view(a, b) for start, (a, b) in zip(starts, sizes, strict=False)]
            if is_fused(tables[0]):
                # Leaves of their own: the gradient of a view of the parameter would be dense.
                pieces = [p.detach().requires_grad_() for p in pieces]
            for (t, _), piece, start in zip(here, pieces, starts, strict=False):
                leaves[id(t), j] = partial(_leaf, piece) if is_fused(t) else partial(_view, exposed, start, piece.shape)
            name = f"{config.name}.partition_{j}"
            assert tables[0].global_metadata is not None
            stored.append(
                StoredPartition(
                    name=name,
                    size=(rows, config.partition_columns[j]),
                    tensors=pieces,
                    shards=stored_shards(config, j, at.sharding_type, tables[0].global_metadata.shards_metadata),
                    local=[shard for _, shard in here],
                )
            )
            self._exposed.append((name, exposed))
        self._stored += stored
        return stored

    @property
    def config(self) -> GroupedEmbeddingConfig:
        return self._config

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Returns (B, ΣD) of the group's features in order; for sequences their (N, D) end to end, flat."""
        replicas = self.replicas
        stride, lengths = features.stride(), features.length_per_key()
        ids = features.values().split(lengths)
        weights = features.weights().split(lengths) if self._config.is_weighted else [None] * len(ids)
        offsets = features.offsets()
        outputs: list[Tensor] = []
        for shard in self._local_shards():
            for _ in range(shard.num_features):
                f = len(outputs)
                if self._sequence:
                    outputs.append(shard.embed(ids[f], replicas).reshape(-1))
                else:
                    bags = offsets[f * stride : (f + 1) * stride + 1]
                    outputs.append(shard.sum(ids[f], bags - bags[0], weights[f], replicas))
        return torch.cat(outputs, dim=0 if self._sequence else 1)

    def uses(self) -> set[tuple[str, int]]:
        """The partitions, by table and number, that the output depends on."""
        return {key for shard in self._local_shards() for key in shard.uses()}

    def _local_shards(self) -> Iterator["LocalShard"]:
        return (shard for shard in self._shards if isinstance(shard, LocalShard))

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._exposed

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # type: ignore[override]
        destination = {} if destination is None else destination
        for p in self._stored:
            destination[f"{prefix}{p.name}.weight"] = p.as_global([t.data for t in p.tensors], self._pg)
        return destination

    def flush(self) -> None:
        """TorchRec calls this before a checkpoint; there is no cache to write back."""

    def purge(self) -> None:
        """TorchRec calls this before loading; there is no cache to drop."""


class LocalShard(nn.Module):
    """One shard of one logical table: ids, or their row codes, to embeddings of the shard's columns."""

    class_map: Tensor | None

    def __init__(
        self, table: ShardedEmbeddingTable, stored: dict[int, Callable[[], Tensor]], device: torch.device | None
    ) -> None:
        super().__init__()
        config, sharding_type = _placed(table).config, _placed(table).sharding_type
        assert config.partitions is not None
        self._config = config
        self._partitions = config.partitions
        self.num_features = len(table.feature_names)
        self._composition = Composition(config.operation, config.path_hidden, config.path_activation)
        self._stored = stored
        self._sparse = is_fused(table)
        start = table.local_metadata.shard_offsets[1] if table.local_metadata is not None else 0
        columns = {j: stored_columns(config, j, start, start + table.local_cols) for j in range(config.num_partitions)}
        self._columns = {j: (a, b) for j, (a, b) in columns.items() if a < b}
        self._code = RowCode(config) if sharding_type in ROW_SPLIT else None
        self._first_row = 0
        if self._code is not None:
            blocks = num_row_blocks(_logical(table))
            self._first_row = _position(table) % blocks * block_rows(config, blocks)
        class_map = config.partitions.class_map
        self.register_buffer("class_map", None if class_map is None else class_map.to(device), persistent=False)

    def embed(self, ids: Tensor, replicas: dict[tuple[str, int], Tensor]) -> Tensor:
        """(N,) → (N, D of this shard)."""
        return compositional_embedding(
            self._composition, self._weights(replicas), self._rows(ids), sparse_gradients=self._sparse_gradients()
        )

    def sum(
        self, ids: Tensor, offsets: Tensor, weights: Tensor | None, replicas: dict[tuple[str, int], Tensor]
    ) -> Tensor:
        """(N,) → (B, D of this shard)."""
        return compositional_bag(
            self._composition, self._weights(replicas), self._rows(ids), offsets, weights, self._sparse_gradients()
        )

    def uses(self) -> set[tuple[str, int]]:
        """The partitions that this shard's output depends on."""
        return {(self._config.name, j) for j in self._columns}

    def _rows(self, ids: Tensor) -> list[Tensor]:
        if self._code is not None:
            ids = self._code.decode(ids, self._first_row)
        rows = self._partitions.class_rows(ids, self.class_map)
        base = self._config.base_partition
        return [rows[j] - self._first_row if j == base else rows[j] for j in self._columns]

    def _weights(self, replicas: dict[tuple[str, int], Tensor]) -> list[Tensor]:
        return [
            self._stored[j]() if j in self._stored else replicas[self._config.name, j][:, a:b]
            for j, (a, b) in self._columns.items()
        ]

    def _sparse_gradients(self) -> list[bool]:
        return [self._sparse and j in self._stored for j in self._columns]


def _leaf(piece: Tensor) -> Tensor:
    return piece


def _view(parameter: Tensor, start: int, size: torch.Size) -> Tensor:
    """A part of a parameter, made anew in every forward: optimizers and checkpoints change parameters in place."""
    return parameter.view(-1)[start : start + size.numel()].view(size)


def _placed(table: ShardedEmbeddingTable) -> Placed:
    at = placed(table)
    assert at is not None
    return at


def _logical(table: ShardedEmbeddingTable) -> list[ShardMetadata]:
    assert table.global_metadata is not None
    return table.global_metadata.shards_metadata


def _stored_shard(table: ShardedEmbeddingTable, j: int) -> ShardMetadata | None:
    at = _placed(table)
    return stored_shard(at.config, j, at.sharding_type, _logical(table), _position(table))


def _position(table: ShardedEmbeddingTable) -> int:
    """The place of this rank's logical shard among all of the table's."""
    assert table.local_metadata is not None
    return _logical(table).index(table.local_metadata)


def _in_backward(data: Tensor, optimizer: RowOptimizer) -> nn.Parameter:
    """A parameter over the same storage, marked as TorchRec marks what is stepped in backward."""
    p = nn.Parameter(data)
    p._in_backward_optimizers = [optimizer]  # type: ignore[attr-defined]
    return p
