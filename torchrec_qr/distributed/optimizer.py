"""The fused optimizer of compositional tables: it steps rows in backward, wherever a partition lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.optim.fused import FusedOptimizer

from torchrec_qr.distributed.update_rules import UpdateRule


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
    parameter group holds ``lr``, which schedules may change.
    """

    def __init__(self, partitions: Sequence[StoredPartition], rule: UpdateRule, pg: dist.ProcessGroup | None) -> None:
        self._rule = rule
        self._state_of: dict[Tensor, dict[str, Tensor]] = {}
        params: dict[str, Tensor | ShardedTensor] = {}
        state: dict[Tensor | ShardedTensor, dict[str, Tensor | ShardedTensor]] = {}
        for p in partitions:
            shown = p.as_global([t.detach() for t in p.tensors], pg)
            params[f"{p.name}.weight"] = shown
            state[shown] = self._init_state(p, pg)
        super().__init__(params, state, [{"params": list(params.values()), "lr": rule.learning_rate}])

    def _init_state(self, p: StoredPartition, pg: dist.ProcessGroup | None) -> dict[str, Tensor | ShardedTensor]:
        local: dict[str, list[Tensor]] = {name: [] for name in self._rule.state_shapes(0, 0)}
        for tensor in p.tensors:
            shapes = self._rule.state_shapes(tensor.shape[0], tensor.shape[1])
            own = {name: torch.zeros(shape, device=tensor.device) for name, shape in shapes.items()}
            self._state_of[tensor] = own
            for name, value in own.items():
                local[name].append(value)
        rowwise = {name for name, shape in self._rule.state_shapes(1, 1).items() if len(shape) == 1}
        return {
            f"{p.name}.{name}": p.rows_as_global(v, pg) if name in rowwise else p.as_global(v, pg)
            for name, v in local.items()
        }

    @torch.no_grad()
    def update(self, tensor: Tensor, rows: Tensor, grad: Tensor) -> None:
        """Steps ``rows`` (n,), each once, of a stored tensor by their gradients (n, columns)."""
        full_state = self._state_of[tensor]
        state = {name: value.index_select(0, rows) for name, value in full_state.items()}
        # `.data`: a later backward over an earlier forward's graph may hold this tensor, as TBE allows it to.
        weight = tensor.data
        new = self._rule.step(weight.index_select(0, rows).float(), grad.float(), state, self._lr)
        weight.index_copy_(0, rows, new.to(weight.dtype))
        for name, value in state.items():
            full_state[name].index_copy_(0, rows, value)

    @property
    def rule_name(self) -> str:
        return type(self._rule).__name__

    @property
    def _lr(self) -> float:
        (group,) = self.param_groups
        return float(group["lr"])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass

    def zero_grad(self, set_to_none: bool = False) -> None:
        pass


def step_in_backward(tensor: Tensor, optimizer: RowOptimizer) -> None:
    """Has a leaf stepped as soon as a backward has its whole gradient, sparse or dense, which is then dropped."""

    def hook(leaf: Tensor) -> None:
        grad = leaf.grad
        assert grad is not None
        leaf.grad = None
        if grad.is_sparse:
            grad = grad.coalesce()
            optimizer.update(tensor, grad.indices()[0], grad.values())
        else:
            optimizer.update(tensor, torch.arange(grad.shape[0], device=grad.device), grad)

    tensor.register_post_accumulate_grad_hook(hook)


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
