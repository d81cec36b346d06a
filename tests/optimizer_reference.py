"""Textbook optimizers in float64, on the gradient of a whole table. Imports nothing from the library."""

from dataclasses import dataclass

import torch
from torch import Tensor

BETA1, BETA2 = 0.8, 0.95
STATES = {
    "sgd": (),
    "adagrad": ("momentum1",),
    "rowwise_adagrad": ("momentum1",),
    "adam": ("momentum1", "exp_avg_sq"),
    "amsgrad": ("momentum1", "exp_avg_sq", "max_exp_avg_sq"),
    "partial_rowwise_adam": ("momentum1", "exp_avg_sq"),
    "lamb": ("momentum1", "exp_avg_sq"),
    "partial_rowwise_lamb": ("momentum1", "exp_avg_sq"),
}
# The states with one value per row.
ROWWISE = {
    "rowwise_adagrad": ("momentum1",),
    "partial_rowwise_adam": ("exp_avg_sq",),
    "partial_rowwise_lamb": ("exp_avg_sq",),
}


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient of a leaf; zeros if no backward has reached it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def zero_state(optimizer: str, weight: Tensor, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rowwise = ROWWISE.get(optimizer, ())
    shapes = {name: weight.shape[:1] if name in rowwise else weight.shape for name in STATES[optimizer]}
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


@dataclass
class OptimizerReference:
    """An optimizer by its name in `STATES`. Weight decay is FBGEMM's, of mode ``l2`` or ``decoupled``."""

    optimizer: str
    lr: float
    eps: float
    max_gradient: float = float("inf")
    weight_decay: float = 0.0
    mode: str = "l2"

    @torch.no_grad()
    def step(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], rows: Tensor, t: int) -> None:
        """Steps ``rows`` of a table and of its state in place. ``t`` counts the steps from 1."""
        of_rows = {name: s[rows] for name, s in state.items()}
        g, w = gradient[rows].clamp(-self.max_gradient, self.max_gradient), weight[rows]
        if self.mode == "l2":
            r = self._direction(g + self.weight_decay * w, of_rows, t)
        else:
            r = self._direction(g, of_rows, t) + self.weight_decay * w
        if "lamb" in self.optimizer:
            ratios = [float(a.norm() / b.norm()) if b.any() else 0.0 for a, b in zip(w, r, strict=True)]
            r = r * torch.tensor(ratios, dtype=w.dtype).view(-1, 1)
        weight[rows] = w - self.lr * r
        for name, s in of_rows.items():
            state[name][rows] = s

    def _direction(self, g: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
        if self.optimizer == "sgd":
            return g
        first = state["momentum1"]
        if self.optimizer == "adagrad":
            first += g**2
            return g / (first.sqrt() + self.eps)
        if self.optimizer == "rowwise_adagrad":
            first += (g**2).mean(dim=1)
            return g / (first.sqrt() + self.eps).unsqueeze(1)
        square = state["exp_avg_sq"]
        first.copy_(BETA1 * first + (1 - BETA1) * g)
        of_gradient = (g**2).mean(dim=1) if "rowwise" in self.optimizer else g**2
        square.copy_(BETA2 * square + (1 - BETA2) * of_gradient)
        if self.optimizer == "amsgrad":
            square = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], square))
        root = (square / (1 - BETA2**t)).sqrt()
        return first / (1 - BETA1**t) / ((root.unsqueeze(1) if root.dim() == 1 else root) + self.eps)
