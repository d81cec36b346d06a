"""The lookup of compositional tables on the ranks that own them, and the parameters behind it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.configs import DTYPES
from torchrec_qr.distributed.fused_params import update_rule
from torchrec_qr.distributed.local_shard import LocalShard, ReplicatedPartitions
from torchrec_qr.distributed.optimizer import RowOptimizer, StoredPartition
from torchrec_qr.distributed.placement import compositional, is_fused, stored_shard_of
from torchrec_qr.distributed.shard_lookup import shard_lookups
from torchrec_qr.distributed.shards import is_replicated, stored_shards
from torchrec_qr.ops.out_of_memory import named_zeros


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
        # Where rows without a gradient may move, too: (rows,) uint8, 1 for those that this rank looked up in a step.
        self.touched_of: dict[tuple[str, int], Tensor] = {}
        self._names: dict[nn.Parameter, str] = {}
        # Aliases, as TBE's are: DDP must not see the mark on a parameter that it manages.
        self._shown: dict[nn.Parameter, nn.Parameter] = {}
        # Of the gradients of parameters that nothing steps in backward; set by `replication.replicate`.
        self.gradient_scale = 1.0
        holders = []
        for table in tables:
            at = compositional(table)
            config, sharding_type = at.config, at.sharding_type
            stored: list[StoredPartition] = []
            for j, rows in enumerate(config.bound_partitions.sizes):
                if not is_replicated(config, j, sharding_type):
                    continue
                size = (rows, config.partition_columns[j])
                what, dtype = f"table {config.name!r}, partition {j}", DTYPES[config.partition_data_types[j]]
                # DDP reduces what a fused optimizer steps in any case, so that the flag may change later.
                reduced = is_fused(table) or not at.frozen
                p = nn.Parameter(named_zeros(what, size, dtype, device), requires_grad=reduced)
                self.parameters_of[config.name, j] = p
                self._names[p] = f"{config.name}.partition_{j}"
                stored.append(StoredPartition(self._names[p], size, [p]))
            if is_fused(table) and stored:
                optimizer = RowOptimizer(stored, update_rule(table.name, table.fused_params or {}), pg=None)
                holders.append(FusedOptimizerHolder(optimizer))
                own = {key: p for key, p in self.parameters_of.items() if key[0] == config.name}
                self.optimizer_of.update((p, optimizer) for p in own.values())
                self._shown.update((p, optimizer.show([p], p.data, at.frozen)) for p in own.values())
                if optimizer.rule.counts_steps:
                    for key, p in own.items():
                        self.touched_of[key] = torch.zeros(p.shape[0], dtype=torch.uint8, device=p.device)
        if self.parameters_of and not any(p.requires_grad for p in self.parameters_of.values()):
            raise NotImplementedError(
                f"tables {sorted({name for name, _ in self.parameters_of})}: all frozen, and held whole by every rank "
                "without a fused optimizer, so that nothing is left for DistributedDataParallel to reduce; allowed: a "
                "fused optimizer, under which a table may be frozen and released at any time"
            )
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

    def warm_up(self) -> None:
        """Has the kernels that step the parameters compiled, where they run on a GPU."""
        for p, optimizer in self.optimizer_of.items():
            optimizer.warm_up(p)

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        for p, name in self._names.items():
            shown = self._shown.get(p, p)
            # A module that was moved has other storage than when the alias was made.
            shown.data = p.data
            yield name, shown


class CompositionalKernel(BaseEmbedding):
    """Looks up a group of compositional shards: maps ids to rows, looks up, composes, and pools unless ``sequence``.

    Stores the partitions that are not replicated. The lookup's backward steps the rows of fused ones, which are leaves;
    others are plain parameters.
    """

    def __init__(
        self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None, device: torch.device | None, sequence: bool
    ) -> None:
        super().__init__()
        self._config = config
        self._sequence = sequence
        self._pg = pg
        # Set by the lookup for every forward.
        self.replicas = ReplicatedPartitions({}, {})
        self._stored: list[StoredPartition] = []
        self._exposed: list[tuple[str, nn.Parameter]] = []
        holders = []
        # Shards of one table may lie anywhere in the group; TorchRec wants one parameter for all of them.
        by_name = sorted(config.embedding_tables, key=lambda t: t.name)
        leaves: dict[tuple[int, int], Callable[[], Tensor]] = {}
        optimizers: dict[str, RowOptimizer] = {}
        for _, group in groupby(by_name, key=lambda t: t.name):
            tables = list(group)
            stored = self._store(tables, leaves, device)
            if not is_fused(tables[0]) or not stored:
                continue
            optimizer = RowOptimizer(stored, update_rule(tables[0].name, tables[0].fused_params or {}), pg)
            holders.append(FusedOptimizerHolder(optimizer))
            optimizers[tables[0].name] = optimizer
            tensors_of = {partition.name: partition.tensors for partition in stored}
            frozen = compositional(tables[0]).frozen
            self._exposed = [
                (name, optimizer.show(tensors_of[name], p.data, frozen) if name in tensors_of else p)
                for name, p in self._exposed
            ]
        self._shards = nn.ModuleList(
            LocalShard(
                t, {j: leaf for (table, j), leaf in leaves.items() if table == id(t)}, optimizers.get(t.name), device
            )
            for t in config.embedding_tables
        )
        self._lookups = shard_lookups(list(self._local_shards()), sequence)
        self.optimizers = nn.ModuleList(holders)
        self.dense = nn.ParameterList(p for _, p in self._exposed if not hasattr(p, "_in_backward_optimizers"))

    def _store(
        self,
        tables: list[ShardedEmbeddingTable],
        leaves: dict[tuple[int, int], Callable[[], Tensor]],
        device: torch.device | None,
    ) -> list[StoredPartition]:
        """Allocates this rank's shards of a table; those of one partition share a storage, which TorchRec is shown."""
        at = compositional(tables[0])
        config = at.config
        stored = []
        for j, rows in enumerate(config.bound_partitions.sizes):
            if is_replicated(config, j, at.sharding_type):
                continue
            here = [(t, shard) for t in tables if (shard := stored_shard_of(t, j)) is not None]
            if not here:
                continue
            sizes = [tuple(shard.shard_sizes) for _, shard in here]
            what, dtype = f"table {config.name!r}, partition {j}", DTYPES[config.partition_data_types[j]]
            flat = named_zeros(what, sum(a * b for a, b in sizes), dtype, device)
            as_stored = flat.view(-1, sizes[0][1]) if len({b for _, b in sizes}) == 1 else flat
            exposed = nn.Parameter(as_stored, requires_grad=not at.frozen)
            starts = [0, *accumulate(a * b for a, b in sizes)]
            pieces = [flat[start : start + a * b].view(a, b) for start, (a, b) in zip(starts, sizes, strict=False)]
            if is_fused(tables[0]):
                # Leaves of their own, which lead autograd to the backward that steps them.
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
        weighted = self._config.is_weighted
        outputs = [lookup.look_up(features, weighted, self.replicas) for lookup in self._lookups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=0 if self._sequence else 1)

    def warm_up(self, replicas: ReplicatedPartitions) -> None:
        """Has the kernels of a step compiled, if they run on a GPU."""
        for lookup in self._lookups:
            lookup.warm_up(self._config.is_weighted, replicas)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "CompositionalKernel":
        super()._apply(fn, recurse)
        # Class maps follow to another device.
        self._lookups = shard_lookups(list(self._local_shards()), self._sequence)
        return self

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


def _leaf(piece: Tensor) -> Tensor:
    return piece


def _view(parameter: Tensor, start: int, size: torch.Size) -> Tensor:
    """A part of a parameter, made anew in every forward: optimizers and checkpoints change parameters in place."""
    return parameter.view(-1)[start : start + size.numel()].view(size)
