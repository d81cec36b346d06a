"""What a lookup is done by: C++ kernels on a CPU, Triton's on a GPU, and PyTorch for all that neither has."""

from typing import Protocol

from torch import Tensor

from torchrec_qr.ops.arguments import Batch, Gradients, Outcome
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.update_rules import Update


class Backend(Protocol):
    """One way to look up tables; a module of this package, so that its functions are these methods."""

    def forward(self, tables: Description, weights: list[Tensor], batch: Batch) -> Tensor:
        """Returns (B, ΣD) fp32 if pooled, else the (N, D) of each table end to end, flat."""

    def backward(
        self,
        tables: Description,
        weights: list[Tensor],
        batch: Batch,
        out_gradient: Tensor,
        outcomes: list[Outcome],
        id_weights_need_gradient: bool,
    ) -> Gradients:
        """Steps rows in place, and returns the gradients that are needed. All are of the values before the step."""

    def update_rows(self, weight: Tensor, rows: Tensor, gradients: Tensor, update: Update) -> None:
        """Steps ``rows`` (n,) int64, each once, of ``weight`` in place by their gradients (n, D_j)."""
