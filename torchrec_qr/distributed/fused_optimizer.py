"""The fused optimizer of compositional tables: it steps rows in backward, wherever a partition lies."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule

from torchrec_qr.distributed.stored_partition import StoredPartition
from torchrec_qr.ops.dispatch import kernels_step, update_rows
from torchrec_qr.ops.out_of_memory import named_zeros
from torchrec_qr.ops.update_rules import Update, UpdateRule


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


class _Leaf(NamedTuple):
    """The parameter that a model shows of a tensor that is stepped, its state, and its number among the pieces."""

    shown: nn.Parameter
    state: dict[str, Tensor]
    counter: _StepCount | None
    piece: int


class RowOptimizer(FusedOptimizer):
    """Steps the partitions of one table by one rule. ``step()`` does nothing: rows move in backward.

    Its state has TorchRec's keys, ``<table>.partition_<j>.weight`` → ``<table>.partition_<j>.<state>``, and its one
    parameter group holds ``lr``, which schedules may change. While ``lr`` is 0, or the parameter that a model shows
    requires no gradient, neither rows nor state move. (FBGEMM advances the state at a rate of 0.)
    """

    def __init__(self, partitions: Sequence[StoredPartition], rule: UpdateRule, pg: dist.ProcessGroup | None) -> None:
        self.rule = rule
        self._leaves: dict[Tensor, _Leaf] = {}
        # Replicated partitions whose rows may move without a gradient have (rows,) uint8 here: 1 for those that this
        # rank looked up in a step.
        self.touched_of: dict[Tensor, Tensor] = {}
        params: dict[str, Tensor | ShardedTensor] = {}
        state: dict[Tensor | ShardedTensor, dict[str, Tensor | ShardedTensor]] = {}
        for p in partitions:
            shown = p.as_global(pg)
            params[f"{p.name}.weight"] = shown
            state[shown] = self._init_state(p, pg)
            # TorchRec's mark of what is stepped in backward.
            p.weight._in_backward_optimizers = [self]  # type: ignore[attr-defined]
            if p.is_replicated and rule.counts_steps:
                leaf = p.reduced
                self.touched_of[leaf] = torch.zeros(leaf.shape[0], dtype=torch.uint8, device=leaf.device)
        super().__init__(params, state, [{"params": list(params.values()), "lr": rule.learning_rate}])

    def _init_state(self, p: StoredPartition, pg: dist.ProcessGroup | None) -> dict[str, Tensor | ShardedTensor]:
        table, j = p.key
        what = f"table {table!r}, state of partition {j}"
        count = _StepCount(len(p.leaves)) if self.rule.counts_steps else None
        for i, leaf in enumerate(p.leaves):
            shapes = self.rule.state_shapes(leaf.shape[0], leaf.shape[1])
            state = {name: named_zeros(what, shape, torch.float32, leaf.device) for name, shape in shapes.items()}
            self._leaves[leaf] = _Leaf(p.weight, state, count, i)
        shown: dict[str, Tensor | ShardedTensor] = {}
        for name, shape in self.rule.state_shapes(1, 1).items():
            as_global = p.rows_as_global if len(shape) == 1 else p.as_global
            shown[f"{p.name}.{name}"] = as_global(pg, [self._leaves[leaf].state[name] for leaf in p.leaves])
        if count is not None:
            shown[f"{p.name}.step"] = count.steps
        return shown

    @torch.no_grad()
    def update_replica(self, leaf: Tensor, grad: Tensor) -> None:
        """Steps the rows of a replicated partition (R, columns) by their gradients in ``grad``, unless it is frozen."""
        touched = self.touched_of.get(leaf)
        # The other rows are untouched, or as good as that under the rules that do not count steps.
        stepped = grad.ne(0).any(dim=1) if touched is None else touched.bool()
        if touched is not None:
            touched.zero_()
        update = self.begin_step(leaf)
        if update is None:
            return
        if leaf.is_cuda and kernels_step(leaf):
            # Pass all rows, -1 for those that stay, because the host would wait for the number of rows.
            rows = torch.arange(len(stepped), device=leaf.device).where(stepped, -1)
        else:
            rows = stepped.nonzero().squeeze(1)
            grad = grad.index_select(0, rows)
        # `.data`: a later backward over an earlier forward's graph may hold this tensor, as TBE allows it to.
        update_rows(leaf.data, rows, grad, update)

    def begin_step(self, tensor: Tensor) -> Update | None:
        """Returns the next step of a leaf, and counts it; None: ``requires_grad_(False)``, or a rate of 0."""
        leaf = self._leaves[tensor]
        if self._lr == 0 or not leaf.shown.requires_grad:
            return None
        return Update(self.rule, leaf.state, self._lr, 1 if leaf.counter is None else leaf.counter.advance(leaf.piece))

    def same_step(self, tensor: Tensor) -> Update:
        """Returns a step of a leaf that is not counted, to compile what takes it."""
        return Update(self.rule, self._leaves[tensor].state, self._lr)

    def warm_up(self, tensor: Tensor) -> None:
        """Has the step of a replicated partition compiled, if a GPU takes it."""
        if tensor.is_cuda and kernels_step(tensor):
            no_row, gradients = torch.full((1,), -1, device=tensor.device), torch.zeros_like(tensor.data[:1])
            update_rows(tensor.data, no_row, gradients, self.same_step(tensor))

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


class FusedOptimizerHolder(nn.Module, FusedOptimizerModule):
    """Holds the optimizer of one table for TorchRec, which looks for optimizers among the modules of a lookup."""

    def __init__(self, optimizer: RowOptimizer) -> None:
        super().__init__()
        self._optimizer = optimizer

    @property
    def fused_optimizer(self) -> RowOptimizer:
        return self._optimizer
