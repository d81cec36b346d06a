"""Textbook optimizers: by how much a step at rate 1 moves the rows that a batch looked up."""

from dataclasses import dataclass

import torch
from torch import Tensor

STATES = {
    "sgd": (),
    "adagrad": ("momentum1",),
    "rowwise_adagrad": ("momentum1",),
    "adam": ("momentum1", "exp_avg_sq"),
    "amsgrad": ("momentum1", "exp_avg_sq", "max_exp_avg_sq"),
}


def zero_state(name: str, rows: int, columns: int) -> dict[str, Tensor]:
    shape = (rows,) if name == "rowwise_adagrad" else (rows, columns)
    return {state: torch.zeros(shape, dtype=torch.float64) for state in STATES[name]}


@dataclass(frozen=True)
class Textbook:
    """An optimizer by its name, and its constants."""

    name: str
    eps: float
    beta1: float
    beta2: float

    def direction(self, g: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
        """Updates the state of the gradient's rows in step ``t``, which counts from 1."""
        match self.name:
            case "sgd":
                return g
            case "adagrad":
                state["momentum1"] += g**2
                return g / (state["momentum1"].sqrt() + self.eps)
            case "rowwise_adagrad":
                state["momentum1"] += (g**2).mean(dim=1)
                return g / (state["momentum1"].sqrt() + self.eps).unsqueeze(1)
        mean, square = state["momentum1"], state["exp_avg_sq"]
        mean.copy_(self.beta1 * mean + (1 - self.beta1) * g)
        square.copy_(self.beta2 * square + (1 - self.beta2) * g**2)
        bound = square
        if self.name == "amsgrad":
            bound = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], square))
        return mean / (1 - self.beta1**t) / ((bound / (1 - self.beta2**t)).sqrt() + self.eps)

    def step(self, weight: Tensor, g: Tensor, state: dict[str, Tensor], rows: Tensor, t: int, lr: float) -> Tensor:
        """Returns the new values of the rows; their state is updated in place."""
        of_rows = {name: value[rows] for name, value in state.items()}
        new = weight[rows] - lr * self.direction(g[rows], of_rows, t)
        for name, value in of_rows.items():
            state[name][rows] = value
        return new
