"""Path composition (arXiv:1909.02107, section 4.1): a base row passed through the MLPs of its classes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_qr.ops.read_rows import Rows, read_rows

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh}


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
    # Inputs sorted by class make one matrix product per class that occurs, with no (N, P) gather of MLPs.
    present, sorted_class, counts = classes.unique(return_inverse=True, return_counts=True)
    order = sorted_class.argsort(stable=True)
    used = read_rows(mlps, present)
    outputs = [
        _mlp(inputs, flat, hidden, activation)
        for inputs, flat in zip(x[order].split(counts.tolist()), used.unbind(0), strict=True)
    ]
    if not outputs:
        # Keeps the graph: an empty batch gives the MLPs a zero gradient rather than none.
        return x + used.sum()
    return torch.cat(outputs)[order.argsort()]


def _mlp(x: Tensor, flat: Tensor, hidden: int | None, activation: str) -> Tensor:
    dim = x.shape[1]
    if hidden is None:
        weight, bias = flat.split([dim * dim, dim])
        return F.linear(x, weight.view(dim, dim), bias)
    w1, b1, w2, b2 = flat.split([hidden * dim, hidden, dim * hidden, dim])
    return F.linear(_ACTIVATIONS[activation](F.linear(x, w1.view(hidden, dim), b1)), w2.view(dim, hidden), b2)
