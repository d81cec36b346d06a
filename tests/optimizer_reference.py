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
}


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient of a leaf; zeros if no backward has reached it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def zero_state(optimizer: str, weight: Tensor, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shape = weight.shape[:1] if optimizer == "rowwise_adagrad" else weight.shape
    return {name: torch.zeros(shape, dtype=dtype) for name in STATES[optimizer]}


@dataclass
class OptimizerReference:
    """An optimizer by its name in `STATES`."""

    optimizer: str
    lr: float
    eps: float
    max_gradient: float = float("inf")

    @torch.no_grad()
    def step(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], rows: Tensor, t: int) -> None:
        """Steps ``rows`` of a table and of its state in place. ``t`` counts the steps from 1."""
        of_rows = {name: s[rows] for name, s in state.items()}
        clipped = gradient[rows].clamp(-self.max_gradient, self.max_gradient)
        weight[rows] -= self.lr * self._direction(clipped, of_rows, t)
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
        square.copy_(BETA2 * square + (1 - BETA2) * g**2)
        if self.optimizer == "amsgrad":
            square = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], square))
        return first / (1 - BETA1**t) / ((square / (1 - BETA2**t)).sqrt() + self.eps)
