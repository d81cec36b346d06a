"""The fused optimizer of compositional tables: it steps rows in backward, wherever a partition lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.optim.fused import FusedOptimizer

from torchrec_qr.ops.dispatch import kernels_step, update_rows
from torchrec_qr.ops.out_of_memory import named_zeros
from torchrec_qr.ops.update_rules import Update, UpdateRule


@dataclass
class StoredPartition:
    """One partition as this rank stores it: all of it (``shards`` None) or those of its shards that lie here.

    ``tensors`` are leaves, one for each of ``local``, each (rows, columns) of its shard.
    """

    name: str
    size: tuple[int, int]
    tensors: list[Tensor]
    shards: list[ShardMetadata] | None = None
    local: Sequence[ShardMetadata] = ()

    def as_global(self, tensors: list[Tensor], pg: dist.ProcessGroup | None) -> Tensor | ShardedTensor:
        """What a ``state_dict`` shows of tensors shaped as the partition's: plain where replicated, else sharded."""
        if self.shards is None:
            return tensors[0]
        return _sharded(tensors, list(self.local), self.shards, self.size, pg)

    def rows_as_global(self, tensors: list[Tensor], pg: dist.ProcessGroup | None) -> Tensor | ShardedTensor:
        """As `as_global`, for one scalar a row and column shard: TorchRec's layout, the column shards end to end."""
        if self.shards is None:
            return tensors[0]
        by_column = sorted(self.shards, key=lambda s: (s.shard_offsets[1], s.shard_offsets[0]))
        rows_of: list[ShardMetadata] = []
        for shard in by_column:
            first = rows_of[-1].shard_offsets[0] + rows_of[-1].shard_sizes[0] if rows_of else 0
            rows_of.append(
                ShardMetadata(shard_offsets=[first], shard_sizes=[shard.shard_sizes[0]], placement=shard.placement)
            )
        mine = [rows_of[by_column.index(shard)] for shard in self.local]
        total = sum(s.shard_sizes[0] for s in rows_of)
        return _sharded(tensors, mine, rows_of, (total,), pg)


class RowOptimizer(FusedOptimizer):
    """Steps the partitions of one table by one rule. ``step()`` does nothing: rows move in backward.

    Its state has TorchRec's keys, ``<table>.partition_<j>.weight`` → ``<table>.partition_<j>.<state>``, and its one
    parameter group holds ``lr``, which schedules may change. While ``lr`` is 0, or the parameter that a model shows
    requires no gradient, neither rows nor state move. (FBGEMM advances the state at a rate of 0.)
    """

    def __init__(self, partitions: Sequence[StoredPartition], rule: UpdateRule, pg: dist.ProcessGroup | None) -> None:
        self.rule = rule
        self._state_of: dict[Tensor, dict[str, Tensor]] = {}
        self._count_of: dict[Tensor, tuple[_StepCount, int]] = {}
        self._shown_as: dict[Tensor, nn.Parameter] = {}
        params: dict[str, Tensor | ShardedTensor] = {}
        state: dict[Tensor | ShardedTensor, dict[str, Tensor | ShardedTensor]] = {}
        for p in partitions:
            shown = p.as_global([t.detach() for t in p.tensors], pg)
            params[f"{p.name}.weight"] = shown
            state[shown] = self._init_state(p, pg)
        super().__init__(params, state, [{"params": list(params.values()), "lr": rule.learning_rate}])

    def _init_state(self, p: StoredPartition, pg: dist.ProcessGroup | None) -> dict[str, Tensor | ShardedTensor]:
        local: dict[str, list[Tensor]] = {name: [] for name in self.rule.state_shapes(0, 0)}
        for tensor in p.tensors:
            shapes = self.rule.state_shapes(tensor.shape[0], tensor.shape[1])
            table, _, j = p.name.rpartition(".partition_")
            what = f"table {table!r}, state of partition {j}"
            own = {name: named_zeros(what, shape, torch.float32, tensor.device) for name, shape in shapes.items()}
            self._state_of[tensor] = own
            for name, value in own.items():
                local[name].append(value)
        counts: dict[str, Tensor | ShardedTensor] = {}
        if self.rule.counts_steps:
            count = _StepCount(len(p.tensors))
            self._count_of.update((tensor, (count, i)) for i, tensor in enumerate(p.tensors))
            counts[f"{p.name}.step"] = count.steps
        rowwise = {name for name, shape in self.rule.state_shapes(1, 1).items() if len(shape) == 1}
        return {
            f"{p.name}.{name}": p.rows_as_global(v, pg) if name in rowwise else p.as_global(v, pg)
            for name, v in local.items()
        } | counts

    @torch.no_grad()
    def update(self, tensor: Tensor, rows: Tensor, grad: Tensor) -> None:
        """Steps ``rows`` (n,), each once, of a stored tensor by their gradients (n, columns), unless it is frozen."""
        update = self.begin_step(tensor)
        if update is not None:
            # `.data`: a later backward over an earlier forward's graph may hold this tensor, as TBE allows it to.
            update_rows(tensor.data, rows, grad, update)

    @torch.no_grad()
    def update_where(self, tensor: Tensor, stepped: Tensor, grad: Tensor) -> None:
        """Steps the rows of a stored tensor (R, columns) that a mask (R,) names by their gradients in ``grad``."""
        if self.is_frozen(tensor):
            return
        if tensor.is_cuda and kernels_step(tensor):
            # The host does not wait for the number of rows: it passes all of them, -1 for those that stay.
            every = torch.arange(len(stepped), device=tensor.device)
            self.update(tensor, every.where(stepped, -1), grad)
        else:
            rows = stepped.nonzero().squeeze(1)
            self.update(tensor, rows, grad.index_select(0, rows))

    def show(self, tensors: Sequence[Tensor], data: Tensor, frozen: bool) -> nn.Parameter:
        """Returns the parameter that a model shows of stored tensors, over ``data``; its flag freezes them.

        It is marked as TorchRec marks what is stepped in backward, and requires no gradient if ``frozen``.
        """
        shown = nn.Parameter(data, requires_grad=not frozen)
        shown._in_backward_optimizers = [self]  # type: ignore[attr-defined]
        self._shown_as.update(dict.fromkeys(tensors, shown))
        return shown

    def is_frozen(self, tensor: Tensor) -> bool:
        """Returns whether a stored tensor and its state stay as they are: ``requires_grad_(False)``, or a rate of 0."""
        shown = self._shown_as.get(tensor)
        return self._lr == 0 or (shown is not None and not shown.requires_grad)

    def begin_step(self, tensor: Tensor) -> Update | None:
        """Returns the next step of a stored tensor, and counts it; None: it is frozen."""
        if self.is_frozen(tensor):
            return None
        return Update(self.rule, self._state_of[tensor], self._lr, self._advance(tensor))

    def same_step(self, tensor: Tensor) -> Update:
        """Returns a step of a stored tensor that is not counted, to compile what takes it."""
        return Update(self.rule, self._state_of[tensor], self._lr)

    def warm_up(self, tensor: Tensor) -> None:
        """Has the step of a replicated partition compiled, if a GPU takes it."""
        if tensor.is_cuda and kernels_step(tensor):
            no_row, gradients = torch.full((1,), -1, device=tensor.device), torch.zeros_like(tensor.data[:1])
            update_rows(tensor.data, no_row, gradients, self.same_step(tensor))

    def _advance(self, tensor: Tensor) -> int:
        if tensor not in self._count_of:
            return 1
        count, piece = self._count_of[tensor]
        return count.advance(piece)

    @property
    def rule_name(self) -> str:
        return type(self.rule).__name__

    @property
    def _lr(self) -> float:
        (group,) = self.param_groups
        return float(group["lr"])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass

    def zero_grad(self, set_to_none: bool = False) -> None:
        pass


class _StepCount:
    """Steps of a partition so far, a part of its state. Its pieces on this rank are stepped one after the other."""

    def __init__(self, pieces: int) -> None:
        self.steps = torch.zeros((), dtype=torch.float32)
        self._ahead = [0] * pieces

    def advance(self, piece: int) -> int:
        """Returns the number of the step that a piece now takes, from 1."""
        self._ahead[piece] += 1
        t = int(self.steps) + self._ahead[piece]
        if done := min(self._ahead):
            self.steps += done
            self._ahead = [n - done for n in self._ahead]
        return t


def _sharded(
    tensors: list[Tensor],
    local: list[ShardMetadata],
    shards: list[ShardMetadata],
    size: tuple[int, ...],
    pg: dist.ProcessGroup | None,
) -> ShardedTensor:
    # Built from known metadata: the usual constructor gathers it, and ranks without a shard here do not take part.
    dtype = tensors[0].dtype if tensors else torch.float32
    metadata = ShardedTensorMetadata(
        shards_metadata=shards, size=torch.Size(size), tensor_properties=TensorProperties(dtype=dtype)
    )
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local_shards=[Shard(t, m) for t, m in zip(tensors, local, strict=True)],
        sharded_tensor_metadata=metadata,
        process_group=pg,
    )
