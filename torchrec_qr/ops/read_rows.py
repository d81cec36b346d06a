"""Rows of a weight in fp32, whatever type they are stored in, and their gradients, which are summed in fp32.

A sum in the storage type stops growing: bf16 has 8 bits, so that 256 + 1 = 256, and fp16 has 11. PyTorch's own lookups
sum gradients in the type of the weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class RowReads:
    """Reads of a weight (R, D), each of which is a leaf of the graph, and the gradients of these leaves.

    Example:
        >>> reads = RowReads(torch.ones(3, 1))
        >>> read_rows(reads, torch.tensor([2, 0, 2])).tolist()
        [[1.0], [1.0], [1.0]]
        >>> reads.gradients = [torch.ones(3, 1)]
        >>> reads.summed()
        (tensor([0, 2]), tensor([[1.],
                [2.]]))
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.rows: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def read(self, rows: Tensor) -> Tensor:
        """Returns a leaf (N, D) fp32: W[rows_n]."""
        leaf = self.weight.index_select(0, rows).float().requires_grad_()
        self.rows.append(rows)
        self.leaves.append(leaf)
        return leaf

    def summed(self) -> tuple[Tensor, Tensor]:
        """Returns the rows (U,) that were read, ascending and each once, with their summed gradients (U, D) fp32.

        On a GPU U is min(N, R), because the host would wait for how many there are. Rows of -1 fill the end.
        """
        rows, gradients = self.rows[0], self.gradients[0]
        if len(self.rows) > 1:
            # The last read first, which is the order in which autograd adds gradients up.
            rows, gradients = torch.cat(self.rows[::-1]), torch.cat(self.gradients[::-1])
        # Both ways add in order, unlike `index_add_` on a GPU.
        if rows.device.type == "cpu":
            size = (self.weight.shape[0], gradients.shape[1])
            # Decide for every sparse tensor in here, because torch 2.11 warns of each whose checks nobody chose.
            with torch.sparse.check_sparse_tensor_invariants(enable=False):
                summed = torch.sparse_coo_tensor(rows.unsqueeze(0), gradients, size).coalesce()
            return summed.indices()[0], summed.values()
        return _summed_without_wait(rows, gradients, min(len(rows), self.weight.shape[0]))

    def dense(self) -> Tensor:
        """Returns the gradient (R, D) of the weight in its type, rounded once."""
        if not self.rows:
            return torch.zeros_like(self.weight)
        total, *others = (
            torch.ops.aten.embedding_dense_backward(gradient, rows, self.weight.shape[0], -1, False)
            for rows, gradient in zip(self.rows[::-1], self.gradients[::-1], strict=True)
        )
        for other in others:
            total += other
        return total.to(self.weight.dtype)


def _summed_without_wait(rows: Tensor, gradients: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Returns up to ``most`` unique rows, ascending and then -1, with their summed gradients (most, D)."""
    in_order, order = rows.sort(stable=True)
    number = in_order.diff(prepend=in_order[:1]).ne(0).cumsum(0)
    unique = in_order.new_full((most,), -1).scatter_(0, number, in_order)
    numbers = torch.empty_like(number).scatter_(0, order, number)
    return unique, torch.ops.aten.embedding_dense_backward(gradients, numbers, most, -1, False)


# A weight as such, whose gradient is of all rows, or its reads.
Rows = Tensor | RowReads


def number_of_rows(weight: Rows) -> int:
    """Returns R of a weight (R, D)."""
    return (weight.weight if isinstance(weight, RowReads) else weight).shape[0]


class _ReadRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, rows: Tensor) -> Tensor:
        return weight.index_select(0, rows).float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        weight, rows = inputs
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        total = gradient.new_zeros(ctx.shape).index_add(0, rows, gradient)
        return total.to(ctx.dtype), None


def read_rows(weight: Rows, rows: Tensor) -> Tensor:
    """Returns (N, D) fp32: out_n = W[rows_n].

    Args:
        weight: (R, D) fp32, fp16 or bf16. Its gradient is summed in fp32 and rounded once.
        rows: (N,) int64, in [0, R).

    Example:
        >>> weight = torch.ones(2, 1, dtype=torch.bfloat16, requires_grad=True)
        >>> read_rows(weight, torch.zeros(5000, dtype=torch.int64)).sum().backward()
        >>> weight.grad.tolist()  # 5,000 rounded to bf16
        [[4992.0], [0.0]]
    """
    if isinstance(weight, RowReads):
        return weight.read(rows)
    if weight.dtype == torch.float32:
        return F.embedding(rows, weight)
    out: Tensor = _ReadRows.apply(weight, rows)
    return out
