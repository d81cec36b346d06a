"""Path composition (arXiv:1909.02107, section 4.1): a base row passed through the MLPs of its classes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_qr.ops.read_rows import Rows, number_of_rows, read_rows

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh}
# Fewer ids make no matrix product that is worth a launch's share of a GPU.
_LEAST_BLOCK = 16


def apply_class_mlps(x: Tensor, mlps: Rows, classes: Tensor, hidden: int | None, activation: str) -> Tensor:
    """Returns y (N, D), y_n = MLP_{c_n}(x_n): each input through the MLP of its own class.

    ``hidden is None``: MLP_c(x) = A_c x + a_c. Otherwise MLP_c(x) = B_c φ(A_c x + a_c) + b_c, with H = ``hidden``.

    Args:
        x: (N, D) inputs.
        mlps: (|P_j|, P) one MLP a row, flattened: A_c (H, D), a_c (H,), B_c (D, H), b_c (D,); H = D and no B_c, b_c
            if ``hidden`` is None.
        classes: (N,) int64, c_n.
        hidden: H or None.
        activation: φ, ``"relu"`` or ``"tanh"``.

    Example:
        >>> double_plus_one = torch.tensor([[2.0, 0.0, 0.0, 2.0, 1.0, 1.0]])
        >>> apply_class_mlps(torch.tensor([[1.0, -3.0]]), double_plus_one, torch.tensor([0]), None, "relu")
        tensor([[ 3., -5.]])
    """
    # Only a CPU knows how many ids each class has, because elsewhere the host would wait for these numbers. A compiler
    # does not know them either.
    apply = _by_class if x.device.type == "cpu" and not torch.compiler.is_compiling() else _by_blocks
    return apply(x, mlps, classes, hidden, activation)


def _by_class(x: Tensor, mlps: Rows, classes: Tensor, hidden: int | None, activation: str) -> Tensor:
    """One matrix product per class that occurs, with no (N, P) gather of MLPs."""
    present, sorted_class, counts = classes.unique(return_inverse=True, return_counts=True)
    order = sorted_class.argsort(stable=True)
    used = read_rows(mlps, present)
    outputs = [
        _mlp(inputs, flat, hidden, activation, F.linear)
        for inputs, flat in zip(x[order].split(counts.tolist()), used.unbind(0), strict=True)
    ]
    if not outputs:
        # Keeps the graph: an empty batch gives the MLPs a zero gradient rather than none.
        return x + used.sum()
    return torch.cat(outputs)[order.argsort()]


def _by_blocks(x: Tensor, mlps: Rows, classes: Tensor, hidden: int | None, activation: str) -> Tensor:
    """One batched matrix product over blocks of ids of one class, whose number follows from shapes.

    A block has as many ids as an MLP has columns. Its MLP is gathered once a block, which is about D floats per id.
    """
    n, dim = x.shape
    size = max(_LEAST_BLOCK, dim)
    present = torch.sym_min(n, number_of_rows(mlps))
    blocks = (n - present) // size + present  # at most, which is if all classes occur
    in_order, order = classes.sort(stable=True)
    rank = torch.arange(n, device=x.device) - torch.searchsorted(in_order, in_order)  # among the ids of its class
    block = (rank % size == 0).cumsum(0) - 1
    place = torch.empty_like(order).scatter_(0, order, block * size + rank % size)
    # Blocks that stay empty have a class that occurs, because no other row may be read, and so be stepped.
    # A compiler does not know if there is a class, and has no rows to step.
    one = F.pad(in_order, (0, 1))[0] if torch.compiler.is_compiling() else in_order[-1:]
    of_blocks = read_rows(mlps, one.expand(blocks).scatter(0, block, in_order))
    inputs = x.new_zeros(blocks * size, dim).index_copy(0, place, x).view(blocks, size, dim)
    return _mlp(inputs, of_blocks, hidden, activation, _batched_linear).view(-1, dim).index_select(0, place)


def _batched_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def _mlp(x: Tensor, flat: Tensor, hidden: int | None, activation: str, linear: Callable[..., Tensor]) -> Tensor:
    """Applies one MLP (P,) to inputs (N, D), or by ``_batched_linear`` MLPs (M, P) to inputs (M, N, D)."""
    dim = x.shape[-1]
    if hidden is None:
        weight, bias = flat.split([dim * dim, dim], dim=-1)
        return linear(x, weight.unflatten(-1, (dim, dim)), bias)
    w1, b1, w2, b2 = flat.split([hidden * dim, hidden, dim * hidden, dim], dim=-1)
    inner = _ACTIVATIONS[activation](linear(x, w1.unflatten(-1, (hidden, dim)), b1))
    return linear(inner, w2.unflatten(-1, (dim, hidden)), b2)
