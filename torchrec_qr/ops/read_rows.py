"""Rows of a weight in fp32, whatever type they are stored in, and their gradients, which are summed in fp32.

A sum in the storage type stops growing: bf16 has 8 bits, so that 256 + 1 = 256, and fp16 has 11. PyTorch's own lookups
sum gradients in the type of the weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class RowGradients:
    """Gradients that a backward has left for a weight of R rows, which are stepped once it is complete.

    Example:
        >>> gradients = RowGradients(3)
        >>> gradients.add(torch.tensor([2, 0, 2]), torch.ones(3, 1))
        >>> gradients.take()
        (tensor([0, 2]), tensor([[1.],
                [2.]]))
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, gradients: Tensor) -> None:
        """Adds the gradients (N, D) of rows (N,), which may occur more than once."""
        self._parts.append((rows, gradients))

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Returns rows (U,), ascending and each once, with their summed gradients (U, D) fp32, and forgets them; None
        where there are none."""
        if not self._parts:
            return None
        parts, self._parts = self._parts, []
        rows, gradients = parts[0] if len(parts) == 1 else (torch.cat(of) for of in zip(*parts, strict=True))
        size = (self._num_rows, gradients.shape[1])
        # Its sums are in order, on a GPU too, where those of `index_add_` are not.
        summed = torch.sparse_coo_tensor(rows.unsqueeze(0), gradients.float(), size, check_invariants=False).coalesce()
        return summed.indices()[0], summed.values()


class _ReadRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, rows: Tensor, into: RowGradients | None) -> Tensor:
        return weight.index_select(0, rows).float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, RowGradients | None], output: Tensor) -> None:
        weight, rows, ctx.into = inputs
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        if ctx.into is None:
            total = gradient.new_zeros(ctx.shape).index_add(0, rows, gradient)
            return total.to(ctx.dtype), None, None
        ctx.into.add(rows, gradient)
        # Without elements: it only leads autograd to the weight's hook, which takes the sums.
        nothing = gradient.new_empty(0, ctx.shape[1], dtype=ctx.dtype)
        return torch.sparse_coo_tensor(rows.new_empty(1, 0), nothing, ctx.shape), None, None


def read_rows(weight: Tensor, rows: Tensor, into: RowGradients | None = None) -> Tensor:
    """Returns (N, D) fp32: out_n = W[rows_n].

    Args:
        weight: (R, D) fp32, fp16 or bf16. Its gradient is summed in fp32 and rounded once.
        rows: (N,) int64, in [0, R).
        into: takes the gradients in place of ``weight.grad``, in fp32, for the hook of a leaf that is stepped in
            backward.

    Example:
        >>> weight = torch.ones(2, 1, dtype=torch.bfloat16, requires_grad=True)
        >>> read_rows(weight, torch.zeros(5000, dtype=torch.int64)).sum().backward()
        >>> weight.grad.tolist()  # 5,000 rounded to bf16
        [[4992.0], [0.0]]
    """
    if weight.dtype == torch.float32 and into is None:
        return F.embedding(rows, weight)
    out: Tensor = _ReadRows.apply(weight, rows, into)
    return out
