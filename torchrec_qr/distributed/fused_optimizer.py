"""The fused optimizer of compositional tables, which steps rows in the backward under every plan."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule

from torchrec_qr.distributed.global_tensor import ShardGroup
from torchrec_qr.distributed.stored_partition import StoredPartition
from torchrec_qr.ops.arguments import Replica
from torchrec_qr.ops.dispatch import kernels_step, update_replicas, update_rows
from torchrec_qr.ops.out_of_memory import named_zeros
from torchrec_qr.ops.update_rules import Update, UpdateRule


class _StepCount:
    """The number of steps of a partition, a part of its state. The backward steps its shards here one by one."""

    def __init__(self, pieces: int) -> None:
        self.steps = torch.zeros((), dtype=torch.float32)
        self._ahead = [0] * pieces

    def advance(self, piece: int) -> int:
        """Counts a step of a shard, and returns its number, from 1."""
        self._ahead[piece] += 1
        t = int(self.steps) + self._ahead[piece]
        if done := min(self._ahead):
            self.steps += done
            self._ahead = [n - done for n in self._ahead]
        return t


class _Leaf(NamedTuple):
    """The model's parameter for a stepped tensor, its group, state, count of steps, and number among the shards."""

    shown: nn.Parameter
    group: dict[str, Any]
    state: dict[str, Tensor]
    counter: _StepCount | None
    piece: int


class _SteppedInBackward(FusedOptimizer):
    """An optimizer whose ``step()`` does nothing, because the backward steps rows."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass

    def zero_grad(self, set_to_none: bool = False) -> None:
        pass


class PartitionOptimizer(_SteppedInBackward):
    """The part of a `RowOptimizer` for one partition, which the parameter has in ``_in_backward_optimizers``.

    Both have one state and one parameter group, so a schedule may change ``lr`` here or there. The parameter's key is
    empty, as in TorchRec. A ``WarmupOptimizer`` around it adds a parameter of its own, to this part alone.
    """


class RowOptimizer(_SteppedInBackward):
    """Steps the partitions of one table by one rule.

    Its state has TorchRec's keys, ``<table>.partition_<j>.weight`` → ``<table>.partition_<j>.<state>``. It has a
    parameter group for each partition, with ``lr``, which schedules may change. If ``lr`` is 0, or the model's
    parameter requires no gradient, neither rows nor state change. (FBGEMM changes the state at a rate of 0.)
    """

    def __init__(self, partitions: Sequence[StoredPartition], rule: UpdateRule, shards: ShardGroup) -> None:
        self.rule = rule
        self._leaves: dict[Tensor, _Leaf] = {}
        # A mask (rows,) uint8 of the rows that this rank looked up in a step, for each replica whose rows may move
        # without a gradient.
        self.touched_of: dict[Tensor, Tensor] = {}
        params: dict[str, Tensor | ShardedTensor] = {}
        state: dict[Tensor | ShardedTensor, dict[str, Tensor | ShardedTensor]] = {}
        groups: list[dict[str, Any]] = []
        for p in partitions:
            shown = p.as_global(shards)
            group = {"params": [shown], "lr": rule.learning_rate}
            params[f"{p.name}.weight"] = shown
            state[shown] = self._init_state(p, group, shards)
            groups.append(group)
            # TorchRec reads this attribute of parameters that the backward steps.
            own = PartitionOptimizer({"": shown}, {shown: state[shown]}, [group])
            p.weight._in_backward_optimizers = [own]  # type: ignore[attr-defined]
            if p.is_replicated and rule.moves_without_gradient:
                leaf = p.reduced
                self.touched_of[leaf] = torch.zeros(leaf.shape[0], dtype=torch.uint8, device=leaf.device)
        super().__init__(params, state, groups)

    def _init_state(
        self, p: StoredPartition, group: dict[str, Any], shards: ShardGroup
    ) -> dict[str, Tensor | ShardedTensor]:
        table, j = p.key
        what = f"table {table!r}, state of partition {j}"
        count = _StepCount(len(p.leaves)) if self.rule.counts_steps else None
        for i, leaf in enumerate(p.leaves):
            shapes = self.rule.state_shapes(leaf.shape[0], leaf.shape[1])
            state = {name: named_zeros(what, shape, torch.float32, leaf.device) for name, shape in shapes.items()}
            self._leaves[leaf] = _Leaf(p.weight, group, state, count, i)
        shown: dict[str, Tensor | ShardedTensor] = {}
        for name, shape in self.rule.state_shapes(1, 1).items():
            as_global = p.rows_as_global if len(shape) == 1 else p.as_global
            shown[f"{p.name}.{name}"] = as_global(shards, [self._leaves[leaf].state[name] for leaf in p.leaves])
        if count is not None:
            shown[f"{p.name}.step"] = count.steps
        return shown

    def states(self) -> Iterator[Tensor]:
        """Yields the states of all leaves, without the number of steps."""
        for leaf in self._leaves.values():
            yield from leaf.state.values()

    @torch.no_grad()
    def replica(self, leaf: Tensor, gradient: Tensor, looked_up: Tensor | None) -> Replica | None:
        """Returns the next step of a replica, and counts it; None if it is frozen or the rate is 0.

        Args:
            leaf (Tensor): (rows, columns), the replica.
            gradient (Tensor): (rows, columns) fp32, of all ranks.
            looked_up (Tensor | None): `touched_of` the leaf, of all ranks.
        """
        mask = self.touched_of.get(leaf)
        update = self.begin_step(leaf)
        if update is None:
            if mask is not None:
                mask.zero_()
            return None
        return Replica(leaf, gradient, update, looked_up, mask)

    def begin_step(self, tensor: Tensor) -> Update | None:
        """Returns the next step of a leaf, and counts it; None if the leaf is frozen or the rate is 0."""
        leaf = self._leaves[tensor]
        rate = float(leaf.group["lr"])
        if rate == 0 or not leaf.shown.requires_grad:
            return None
        return Update(self.rule, leaf.state, rate, 1 if leaf.counter is None else leaf.counter.advance(leaf.piece))

    def same_step(self, tensor: Tensor) -> Update:
        """Returns a step of a leaf without counting it, to compile its kernels."""
        leaf = self._leaves[tensor]
        return Update(self.rule, leaf.state, float(leaf.group["lr"]))

    def warm_up(self, tensor: Tensor) -> None:
        """Compiles the step of a replica on a GPU."""
        if tensor.is_cuda and kernels_step(tensor):
            # No row has a gradient, or has been looked up.
            gradient = torch.zeros(tensor.shape, device=tensor.device)
            mask = self.touched_of.get(tensor)
            step_replicas([Replica(tensor.data, gradient, self.same_step(tensor), mask, mask)])

    @property
    def rule_name(self) -> str:
        return type(self.rule).__name__


@torch.no_grad()
def step_replicas(replicas: Sequence[Replica]) -> None:
    """Steps the rows of replicas that have been looked up, or have a gradient if without one they stay."""
    at_once: list[Replica] = []
    for r in replicas:
        if r.weight.is_cuda and kernels_step(r.weight):
            at_once.append(r)
        else:
            _step_replica(r)
    if at_once:
        update_replicas(at_once)


def _step_replica(r: Replica) -> None:
    stepped = r.gradient.ne(0).any(dim=1) if r.looked_up is None else r.looked_up.bool()
    gradient = r.gradient
    if r.weight.is_cuda:
        # Pass all rows, and -1 for those that stay, because the host would wait for the number of rows.
        rows = torch.arange(len(stepped), device=stepped.device).where(stepped, -1)
    else:
        rows = stepped.nonzero().squeeze(1)
        gradient = gradient.index_select(0, rows)
    if r.mask is not None:
        r.mask.zero_()
    # Step `.data`, because the graph of an earlier forward may hold this tensor, which FBGEMM allows too.
    update_rows(r.weight.data, rows, gradient, r.update)


class FusedOptimizerHolder(nn.Module, FusedOptimizerModule):
    """A module with the optimizer of one table, because TorchRec finds optimizers among the modules of a lookup."""

    def __init__(self, optimizer: RowOptimizer) -> None:
        super().__init__()
        self._optimizer = optimizer

    @property
    def fused_optimizer(self) -> RowOptimizer:
        return self._optimizer
