"""The lookup by kernels as operators of ``torch.library``, which compilers and fake tensors see as one operation.

- ``torchrec_qr::lookup`` has gradients for autograd, dense ones of the weights and that of the ids' weights;
- ``torchrec_qr::lookup_gradients`` is its backward.

Operators take plain values, so that a description travels as its text.
"""

from typing import Any

import torch
from torch import Tensor

from torchrec_qr.ops.arguments import Batch, DenseGradient
from torchrec_qr.ops.description import described
from torchrec_qr.ops.dispatch import kernels_on

# A graph would replay what comes from the host at every call: addresses, learning rates, and checks of ids.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("torchrec_qr::lookup", mutates_args=(), device_types=("cpu", "cuda"), tags=_TAGS)
def lookup_op(
    weights: list[Tensor],
    class_maps: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    tables: str,
    pooled: bool,
) -> Tensor:
    batch = Batch(ids, offsets, id_weights, pooled)
    return kernels_on(weights[0].device).forward(described(tables, class_maps), weights, batch)


@lookup_op.register_fake
def _(
    weights: list[Tensor],
    class_maps: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    tables: str,
    pooled: bool,
) -> Tensor:
    of = described(tables)
    if pooled:
        return weights[0].new_empty((offsets.shape[0] - 1) // of.num_features, of.columns, dtype=torch.float32)
    dims = {t.dim for t in of.tables}
    # Tables of several widths: how many ids each has is not known before it runs.
    size = ids.shape[0] * dims.pop() if len(dims) == 1 else torch.library.get_ctx().new_dynamic_size()
    return weights[0].new_empty(size, dtype=torch.float32)


@torch.library.custom_op("torchrec_qr::lookup_gradients", mutates_args=(), device_types=("cpu", "cuda"), tags=_TAGS)
def lookup_gradients_op(
    out_gradient: Tensor,
    weights: list[Tensor],
    class_maps: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    tables: str,
    pooled: bool,
    needed: list[bool],
    id_weights_need_gradient: bool,
) -> list[Tensor]:
    found = kernels_on(weights[0].device).backward(
        described(tables, class_maps),
        weights,
        Batch(ids, offsets, id_weights, pooled),
        out_gradient,
        [DenseGradient() if n else None for n in needed],
        id_weights_need_gradient,
    )
    # An operator returns tensors alone, of which no two share memory: empty ones are none.
    of_weights = [
        w.new_empty(0) if g is None else _with_own_memory(g) for g, w in zip(found.weights, weights, strict=True)
    ]
    return [*of_weights, out_gradient.new_empty(0) if found.id_weights is None else found.id_weights]


def _with_own_memory(gradient: Tensor) -> Tensor:
    return gradient.clone() if gradient.nbytes < gradient.untyped_storage().nbytes() else gradient


@lookup_gradients_op.register_fake
def _(
    out_gradient: Tensor,
    weights: list[Tensor],
    class_maps: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    tables: str,
    pooled: bool,
    needed: list[bool],
    id_weights_need_gradient: bool,
) -> list[Tensor]:
    of_ids = ids.new_empty(ids.shape[0] if id_weights_need_gradient else 0, dtype=torch.float32)
    return [*(w.new_empty(w.shape if n else 0) for w, n in zip(weights, needed, strict=True)), of_ids]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, class_maps, ids, offsets, id_weights, *ctx.rest = inputs
    ctx.num_weights, ctx.num_maps = len(weights), len(class_maps)
    ctx.needed = [w.requires_grad for w in weights]
    ctx.id_weights_need_gradient = id_weights is not None and id_weights.requires_grad
    ctx.save_for_backward(ids, offsets, id_weights, *weights, *class_maps)


def _backward(ctx: Any, out_gradient: Tensor) -> tuple[Any, ...]:
    ids, offsets, id_weights, *tensors = ctx.saved_tensors
    weights, class_maps = tensors[: ctx.num_weights], tensors[ctx.num_weights :]
    *of_weights, of_ids = lookup_gradients_op(
        out_gradient,
        weights,
        class_maps,
        ids,
        offsets,
        id_weights,
        *ctx.rest,
        ctx.needed,
        ctx.id_weights_need_gradient,
    )
    of_weights = [g if n else None for g, n in zip(of_weights, ctx.needed, strict=True)]
    of_id_weights = of_ids.to(id_weights.dtype) if ctx.id_weights_need_gradient else None
    # A list without entries has no gradients either, and autograd wants one per entry.
    return of_weights, [None] * ctx.num_maps, None, None, of_id_weights, None, None


lookup_op.register_autograd(_backward, setup_context=_save)
