"""The lookup as operators of ``torch.library``: a group of tables at once, from ids to pooled embeddings.

    out[b, f] = Σ_{ids x of bag (b, f)} w_x · compose_j( W_j[row_j(x)] )

or, not pooled, compose_j( W_j[row_j(x_n)] ) per id. An operator here has one implementation per kind of device,
registered under the device's name. What they share: the tables are told as a list of integers
(`torchrec_qr.ops.layout`), rows are read once, and nothing of size (N, K, D) or (N, K) is made.

- ``torchrec_qr::lookup`` has gradients for autograd, dense ones of the weights and that of the ids' weights;
- ``torchrec_qr::lookup_gradients`` is its backward;
- ``torchrec_qr::lookup_step`` is the backward that steps rows in place: see `stepped_lookup`.

On a CPU they are the C++ kernels (`torchrec_qr.ops.cpu`), on CUDA those of Triton (`torchrec_qr.ops.triton`).
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_qr.ops import cpu
from torchrec_qr.ops.arguments import GRADIENT, NOTHING, Batch, Gradients, rows_overlap
from torchrec_qr.ops.compositional_bag import Composition, compositional_bag, compositional_embedding
from torchrec_qr.ops.cpu_structs import plan_of
from torchrec_qr.ops.layout import decode, rows_of
from torchrec_qr.ops.transforms import is_transformed
from torchrec_qr.ops.triton_compiler import load_driver

# Of weights, in the kernels; others are PyTorch's.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A graph would replay what comes from the host at every call: addresses, learning rates, and checks of ids.
_TAGS = (torch.Tag.cudagraph_unsafe,)


class Lookup(NamedTuple):
    """The tables of a lookup: their layout (`layout.encode`), names, and class maps of those with explicit ones."""

    layout: list[int]
    names: list[str]
    class_maps: list[Tensor]


def available(device: torch.device) -> bool:
    """Returns whether the operators have an implementation for a device; else PyTorch takes their place."""
    return _has_triton() if device.type == "cuda" else device.type == "cpu" and cpu.available()


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _backend(device: torch.device) -> ModuleType:
    return cpu if device.type == "cpu" else gpu_kernels()


def gpu_kernels() -> ModuleType:
    """Returns `torchrec_qr.ops.triton`, once Triton can launch."""
    # Here, since it imports Triton, which may be missing and is of no use on a CPU.
    from torchrec_qr.ops import triton

    load_driver()
    return triton


@torch.library.custom_op("torchrec_qr::lookup", mutates_args=(), device_types=("cpu", "cuda"), tags=_TAGS)
def lookup_op(
    weights: list[Tensor],
    class_maps: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    layout: list[int],
    names: str,
    pooled: bool,
) -> Tensor:
    backend = _backend(weights[0].device)
    out: Tensor = backend.look_up(weights, class_maps, Batch(ids, offsets, id_weights, pooled), layout, names)
    return out


@lookup_op.register_fake
def _(
    weights: list[Tensor],
    class_maps: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    layout: list[int],
    names: str,
    pooled: bool,
) -> Tensor:
    plan = plan_of(tuple(layout))
    if pooled:
        return weights[0].new_empty((offsets.shape[0] - 1) // plan.num_features, plan.columns, dtype=torch.float32)
    dims = set(plan.tables["dim"].tolist())
    # Tables of several widths: how many ids each has is not known before it runs.
    size = ids.shape[0] * dims.pop() if len(dims) == 1 else torch.library.get_ctx().new_dynamic_size()
    return weights[0].new_empty(size, dtype=torch.float32)


def _empty_gradients(
    weights: list[Tensor], needed: list[bool], ids: Tensor, weights_need_gradient: bool
) -> list[Tensor]:
    """What either backward returns, without its values."""
    of_ids = ids.new_empty(ids.shape[0] if weights_need_gradient else 0, dtype=torch.float32)
    return [*(w.new_empty(w.shape if n else 0) for w, n in zip(weights, needed, strict=True)), of_ids]


@torch.library.custom_op("torchrec_qr::lookup_gradients", mutates_args=(), device_types=("cpu", "cuda"), tags=_TAGS)
def lookup_gradients_op(
    out_gradient: Tensor,
    weights: list[Tensor],
    class_maps: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    layout: list[int],
    names: str,
    pooled: bool,
    needed: list[bool],
    weights_need_gradient: bool,
) -> list[Tensor]:
    rules = [GRADIENT if n else NOTHING for n in needed]
    gradients = Gradients(rules, [], [], [])
    batch = Batch(ids, offsets, id_weights, pooled)
    propagate = _backend(weights[0].device).propagate
    out: list[Tensor] = propagate(
        out_gradient, weights, class_maps, batch, layout, names, gradients, weights_need_gradient
    )
    return out


@lookup_gradients_op.register_fake
def _(
    out_gradient: Tensor,
    weights: list[Tensor],
    class_maps: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    layout: list[int],
    names: str,
    pooled: bool,
    needed: list[bool],
    weights_need_gradient: bool,
) -> list[Tensor]:
    return _empty_gradients(weights, needed, ids, weights_need_gradient)


@torch.library.custom_op(
    "torchrec_qr::lookup_step",
    mutates_args=("weights", "states", "touched"),
    device_types=("cpu", "cuda"),
    tags=_TAGS,
)
def lookup_step_op(
    out_gradient: Tensor,
    weights: list[Tensor],
    states: list[Tensor],
    touched: list[Tensor],
    class_maps: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    layout: list[int],
    names: str,
    pooled: bool,
    rules: list[int],
    hyper: list[float],
    weights_need_gradient: bool,
) -> list[Tensor]:
    gradients = Gradients(rules, states, hyper, touched)
    batch = Batch(ids, offsets, id_weights, pooled)
    propagate = _backend(weights[0].device).propagate
    out: list[Tensor] = propagate(
        out_gradient, weights, class_maps, batch, layout, names, gradients, weights_need_gradient
    )
    return out


@lookup_step_op.register_fake
def _(
    out_gradient: Tensor,
    weights: list[Tensor],
    states: list[Tensor],
    touched: list[Tensor],
    class_maps: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    layout: list[int],
    names: str,
    pooled: bool,
    rules: list[int],
    hyper: list[float],
    weights_need_gradient: bool,
) -> list[Tensor]:
    return _empty_gradients(weights, [rule == GRADIENT for rule in rules], ids, weights_need_gradient)


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
    # A list without entries has no gradients either, and autograd wants one per entry.
    return of_weights, [None] * ctx.num_maps, None, None, _as_given(of_ids, id_weights), None, None, None


def _as_given(of_ids: Tensor, id_weights: Tensor | None) -> Tensor | None:
    return None if id_weights is None or not of_ids.numel() else of_ids.to(id_weights.dtype)


lookup_op.register_autograd(_backward, setup_context=_save)


def _in_pytorch(
    tables: Lookup, weights: list[Tensor], ids: Tensor, offsets: Tensor, id_weights: Tensor | None, pooled: bool
) -> Tensor:
    """`look_up` where the operators have no implementation: other devices, other types, and transforms."""
    outputs, layouts = [], decode(tables.layout)
    remaining, class_maps = list(weights), iter(tables.class_maps)
    num_bags = (offsets.numel() - 1) // sum(t.num_features for t in layouts) if pooled else 1
    feature = 0
    for table in layouts:
        own, remaining = remaining[: len(table.partitions)], remaining[len(table.partitions) :]
        class_map = next(class_maps) if table.has_map else None
        for _ in range(table.num_features):
            bags = offsets[feature * num_bags : (feature + 1) * num_bags + 1]
            span = slice(*bags[[0, -1]].tolist())
            rows = rows_of(table, ids[span], class_map)
            if pooled:
                weights_of = None if id_weights is None else id_weights[span]
                out = compositional_bag(Composition(table.operation), own, rows, bags - bags[0], weights_of)
                if table.mean:
                    out = out / bags.diff().clamp(min=1).unsqueeze(1)
                outputs.append(out)
            else:
                outputs.append(compositional_embedding(Composition(table.operation), own, rows).reshape(-1))
            feature += 1
    return torch.cat(outputs, dim=1 if pooled else 0)


def look_up(
    tables: Lookup, weights: list[Tensor], ids: Tensor, offsets: Tensor | None, id_weights: Tensor | None, pooled: bool
) -> Tensor:
    """Returns (B, ΣD) if ``pooled``, else the (N, D) of each table end to end, flat; differentiable.

    Args:
        tables: what is looked up, consecutive features of the batch.
        weights: per table its K weights, (R_j, D_j) in fp32, fp16 or bf16; accumulation is in fp32. Those whose rows
            overlap are copied.
        ids: (N,) int32 or int64, feature after feature.
        offsets: (F·B + 1,) of bags from 0 to N if ``pooled``, else (F + 1,) of features; None for one feature.
        id_weights: (N,) w_x, or None for 1.
        pooled: whether ids are pooled.

    Raises (on CUDA by a later call, since nothing waits for the device; see `torchrec_qr.raise_pending`):
        IndexError: an id outside of its table; nothing has been read there.
        ValueError: offsets that decrease, or do not end at N; sizes that do not fit.
        TypeError: ids or offsets that are not integers.

    Example:
        >>> from torchrec_qr.ops.layout import PartitionLayout, TableLayout, encode
        >>> qr = TableLayout("mult", (PartitionLayout(4, 1, 2), PartitionLayout(4, 2, 2)), num_ids=4)
        >>> w0, w1 = torch.ones(2, 4) * torch.tensor([[1.0], [3.0]]), torch.ones(2, 4) * torch.tensor([[10.0], [20.0]])
        >>> tables = Lookup(encode([qr]), ["t"], [])
        >>> if available(torch.device("cpu")):
        ...     look_up(tables, [w0, w1], torch.tensor([1, 3, 0]), torch.tensor([0, 2, 3]), None, True)[:, 0].tolist()
        ... else:
        ...     [90.0, 10.0]
        [90.0, 10.0]
    """
    if offsets is None:
        offsets = torch.tensor([0, ids.shape[0]])
    if is_transformed() or not available(weights[0].device) or any(w.dtype not in DTYPES for w in weights):
        return _in_pytorch(tables, weights, ids, offsets, id_weights, pooled)
    # The kernels go from row to row by a stride of at least a row. Autograd leads the copy's gradient back.
    weights = [w.contiguous() if rows_overlap(w) else w for w in weights]
    return _in_kernels(tables, weights, ids, offsets, id_weights, pooled)


def _in_kernels(
    tables: Lookup, weights: list[Tensor], ids: Tensor, offsets: Tensor, id_weights: Tensor | None, pooled: bool
) -> Tensor:
    """`look_up` by the operators, which refuse weights whose rows overlap."""
    out: Tensor = lookup_op(
        weights, tables.class_maps, ids, offsets, id_weights, tables.layout, "\n".join(tables.names), pooled
    )
    return out


class _SteppedLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tables: Lookup,
        steps: Callable[[], Gradients],
        pooled: bool,
        ids: Tensor,
        offsets: Tensor,
        id_weights: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.tables, ctx.steps, ctx.pooled = tables, steps, pooled
        ctx.save_for_backward(ids, offsets, id_weights)
        # Not saved for backward, and without their version counters: rows may move before it, as TBE's may.
        ctx.weights = [w.data for w in weights]
        # No copies, because the backward steps these very rows.
        return _in_kernels(tables, ctx.weights, ids, offsets, id_weights, pooled)

    @staticmethod
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Any, ...]:
        ids, offsets, id_weights = ctx.saved_tensors
        steps = ctx.steps()
        *of_weights, of_ids = lookup_step_op(
            out_gradient,
            ctx.weights,
            steps.states,
            steps.touched,
            ctx.tables.class_maps,
            ids,
            offsets,
            id_weights,
            ctx.tables.layout,
            "\n".join(ctx.tables.names),
            ctx.pooled,
            steps.rules,
            steps.hyper,
            ctx.needs_input_grad[5],
        )
        dense = [g if rule == GRADIENT else None for g, rule in zip(of_weights, steps.rules, strict=True)]
        return None, None, None, None, None, _as_given(of_ids, id_weights), *dense


@torch.compiler.disable  # its backward reads the optimizer, of which a compiler makes nothing: it is called as it is
def stepped_lookup(
    tables: Lookup,
    weights: list[Tensor],
    steps: Callable[[], Gradients],
    ids: Tensor,
    offsets: Tensor,
    id_weights: Tensor | None,
    pooled: bool,
) -> Tensor:
    """As `look_up`; the backward steps the rows of some weights in place, and gives autograd no gradient of those.

    Every row that was looked up is stepped once, by its gradient summed over the batch, which is of the values before
    the step. ``steps`` is called in the backward, so that it sees the learning rate of that moment.
    """
    out: Tensor = _SteppedLookup.apply(tables, steps, pooled, ids, offsets, id_weights, *weights)
    return out


def step_rows(
    weight: Tensor, rows: Tensor, gradients: Tensor, rule: str, states: list[Tensor], hyper: Sequence[float]
) -> None:
    """Steps ``rows`` (n,) int64, each once, of ``weight`` in place by their gradients (n, D_j).

    Of a device that is `available`, and rows of up to ``MAX_WIDTH`` columns; ``rule`` and ``hyper`` as
    `torchrec_qr.ops.arguments.Gradients` has them.

    Example:
        >>> weight = torch.ones(3, 4)
        >>> if available(weight.device):
        ...     step_rows(weight, torch.tensor([2]), torch.ones(1, 4), "sgd", [], [0.5, 0, 0, 0, 1, 1, -1])
        ...     weight[:, 0].tolist()
        ... else:
        ...     [1.0, 1.0, 0.5]
        [1.0, 1.0, 0.5]
    """
    _backend(weight.device).step_rows(weight, rows, gradients, rule, states, hyper)


# `torch.fx` records it as a call: which implementation runs follows from the device, at run time.
torch.fx.wrap("look_up")
