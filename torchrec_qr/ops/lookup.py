"""The lookup of a group of tables at once, from ids to pooled embeddings.

    out[b, f] = Σ_{ids x of bag (b, f)} w_x · compose_j( W_j[row_j(x)] )

or, not pooled, compose_j( W_j[row_j(x_n)] ) per id. A backend does it: kernels if they have the tables, the types and
the device (`torchrec_qr.ops.dispatch`), else PyTorch. The kernels read rows once, and make nothing of size (N, K, D) or
(N, K).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_qr.ops.arguments import Batch, DenseGradient, Outcome, rows_apart
from torchrec_qr.ops.backends import torch as pytorch
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.dispatch import kernels_on, kernels_take
from torchrec_qr.ops.operators import lookup_op
from torchrec_qr.ops.transforms import is_traced


def look_up(tables: Description, weights: list[Tensor], batch: Batch) -> Tensor:
    """Returns (B, ΣD) fp32 of a batch whose ids are pooled; differentiable.

    Args:
        tables: what is looked up, consecutive features of the batch.
        weights: per table its K weights, (R_j, D_j) in fp32, fp16 or bf16; accumulation is in fp32. Those whose rows
            overlap are copied.
        batch: ids, offsets and weights of ids.

    Raises (on CUDA by a later call, since nothing waits for the device; see `torchrec_qr.raise_pending`):
        IndexError: an id outside of its table; nothing has been read there.
        ValueError: offsets that decrease, or do not end at N; sizes that do not fit.
        TypeError: ids or offsets that are not integers.

    Example:
        >>> from torchrec_qr.ops.description import PartitionLayout, TableLayout
        >>> qr = TableLayout("mult", (PartitionLayout(4, 1, 2), PartitionLayout(4, 2, 2)), num_ids=4)
        >>> w0, w1 = torch.ones(2, 4) * torch.tensor([[1.0], [3.0]]), torch.ones(2, 4) * torch.tensor([[10.0], [20.0]])
        >>> batch = Batch(ids=torch.tensor([1, 3, 0]), offsets=torch.tensor([0, 2, 3]), weights=None, pooled=True)
        >>> look_up(Description([qr], ["t"]), [w0, w1], batch)[:, 0].tolist()
        [90.0, 10.0]
    """
    if not kernels_take(tables, weights):
        # PyTorch differentiates, transforms and compiles its own operations.
        return pytorch.forward(tables, weights, batch)
    weights = rows_apart(weights)
    if is_traced(weights[0], batch.ids):
        traced: Tensor = lookup_op(
            weights, tables.class_maps, batch.ids, batch.offsets, batch.weights, tables.text, pooled=True
        )
        return traced
    out: Tensor = _Lookup.apply(tables, None, True, batch.starts, batch.ids, batch.offsets, batch.weights, *weights)
    return out


@torch.compiler.disable  # its backward reads the optimizer, which a compiler cannot trace
def stepped_lookup(
    tables: Description, weights: list[Tensor], batch: Batch, outcomes: Callable[[], list[Outcome]]
) -> Tensor:
    """As `look_up`, or without pooling the (N, D) of each feature end to end, flat.

    The backward steps the rows of some weights in place, and gives autograd no gradient of those.

    Every row that was looked up is stepped once, by its gradient summed over the batch, which is of the values before
    the step.

    Args:
        tables, weights, batch: as `look_up`; rows of weights do not overlap.
        outcomes: called in the backward, so that it reads the learning rate of that moment. Returns per weight the
            `torchrec_qr.ops.update_rules.Update` that steps it, a
            `torchrec_qr.ops.arguments.DenseGradient` if autograd has its gradient, or None if it has none.

    Example:
        >>> from torchrec_qr.ops.description import PartitionLayout, TableLayout
        >>> from torchrec_qr.ops.update_rules import Sgd, Update
        >>> weight = torch.ones(3, 4, requires_grad=True)
        >>> batch = Batch(ids=torch.tensor([2, 2]), offsets=torch.tensor([0, 2]), weights=None, pooled=True)
        >>> tables = Description([TableLayout("add", (PartitionLayout(4, 1, 3),), num_ids=3)], ["t"])
        >>> out = stepped_lookup(tables, [weight], batch, lambda: [Update(Sgd(), {}, learning_rate=0.25)])
        >>> out.sum().backward()
        >>> weight[:, 0].tolist(), weight.grad
        ([1.0, 1.0, 0.5], None)
    """
    out: Tensor = _Lookup.apply(
        tables, outcomes, batch.pooled, batch.starts, batch.ids, batch.offsets, batch.weights, *weights
    )
    return out


class _Lookup(torch.autograd.Function):
    """A backend's forward and backward; the backward steps rows if ``outcomes`` are given."""

    @staticmethod
    def forward(
        ctx: Any,
        tables: Description,
        outcomes: Callable[[], list[Outcome]] | None,
        pooled: bool,
        starts: Any,
        ids: Tensor,
        offsets: Tensor,
        id_weights: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.tables, ctx.outcomes, ctx.pooled, ctx.starts = tables, outcomes, pooled, starts
        ctx.backend = kernels_on(weights[0].device) if kernels_take(tables, weights) else pytorch
        ctx.kept = [] if any(ctx.needs_input_grad) else None
        if outcomes is None:
            ctx.save_for_backward(ids, offsets, id_weights, *weights)
        else:
            ctx.save_for_backward(ids, offsets, id_weights)
            # Without their version counters: rows may move before the backward, as TBE's may.
            ctx.weights = weights
        out: Tensor = ctx.backend.forward(
            tables, list(weights), Batch(ids, offsets, id_weights, pooled, starts, ctx.kept)
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Any, ...]:
        ids, offsets, id_weights, *weights = ctx.saved_tensors
        id_weights_need_gradient, *needed = ctx.needs_input_grad[6:]
        outcomes: list[Outcome]
        if ctx.outcomes is None:
            outcomes = [DenseGradient() if n else None for n in needed]
        else:
            weights, outcomes = list(ctx.weights), ctx.outcomes()
        batch = Batch(ids, offsets, id_weights, ctx.pooled, ctx.starts, ctx.kept)
        found = ctx.backend.backward(ctx.tables, weights, batch, out_gradient, outcomes, id_weights_need_gradient)
        of_ids = None if found.id_weights is None else found.id_weights.to(id_weights.dtype)
        return None, None, None, None, None, None, of_ids, *found.weights
