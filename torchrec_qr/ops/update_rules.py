"""Exact optimizer steps on the rows that a batch touched: the same rule wherever a partition lies.

Formulas are FBGEMM's (``EmbOptimType``): one step per row and batch, from the gradient summed over the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

# What the kernels read of a step: the numbers of `UpdateRule.numbers`, in this order.
NUMBERS = ("learning_rate", "eps", "beta1", "beta2", "correction1", "correction2", "max_gradient", "l2", "decay")
# Added to the number of a rule with weight decay, so that Triton compiles the others without it.
DECAYS = 16


@dataclass(frozen=True)
class UpdateRule(ABC):
    """w ← w - lr · (direction(g + l2 · w) + decay · w), g the gradient of a row, its entries clipped to ±max_gradient.

    ``l2`` is FBGEMM's weight decay of mode L2, and ``decay`` that of mode DECOUPLE. Only rows that a batch looked up
    decay.
    """

    # As csrc/lookup.h numbers the rules, from 1.
    number: ClassVar[int]
    # Whether a step moves a row whose gradient is zero, and depends on the number t of steps so far.
    counts_steps: ClassVar[bool] = False

    learning_rate: float = 0.01
    eps: float = 1e-8
    max_gradient: float | None = None
    l2: float = 0.0
    decay: float = 0.0

    @abstractmethod
    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the state kept for ``rows`` rows, by TorchRec's names."""

    @abstractmethod
    def direction(self, grad: Tensor, state: Mapping[str, Tensor], t: int) -> Tensor:
        """Advances ``state`` in place, one entry per row of ``grad`` (n, columns), and returns the step / lr."""

    def step(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], lr: float, t: int) -> Tensor:
        """Returns the new values of ``weight`` (n, columns), all in fp32."""
        if self.max_gradient is not None:
            grad = grad.clamp(-self.max_gradient, self.max_gradient)
        if self.l2:
            grad = grad + self.l2 * weight
        direction = self.direction(grad, state, t)
        if self.decay:
            direction = direction + self.decay * weight
        return weight - lr * self._scaled(direction, weight)

    def numbers(self, lr: float, t: int) -> list[float]:
        """The `NUMBERS` of step t; no limit: -1."""
        limit = -1.0 if self.max_gradient is None else self.max_gradient
        return [lr, self.eps, *self._moments(t), limit, self.l2, self.decay]

    @property
    def compiled_number(self) -> int:
        """The number by which Triton's kernels are compiled: ``number``, or `DECAYS` more with weight decay."""
        return self.number + (DECAYS if self.l2 or self.decay else 0)

    @property
    def moves_without_gradient(self) -> bool:
        """True if a step moves a row that was looked up and whose gradient is zero."""
        return self.counts_steps or bool(self.l2 or self.decay)

    def _moments(self, t: int) -> tuple[float, float, float, float]:
        return 0.0, 0.0, 1.0, 1.0

    def _scaled(self, direction: Tensor, weight: Tensor) -> Tensor:
        return direction


@dataclass(frozen=True)
class Sgd(UpdateRule):
    """w ← w - lr · g."""

    number = 1

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], t: int) -> Tensor:
        return grad


@dataclass(frozen=True)
class Adagrad(UpdateRule):
    """h ← h + g²; w ← w - lr · g / (√h + eps)."""

    number = 2

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"momentum1": (rows, columns)}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], t: int) -> Tensor:
        sums = state["momentum1"].add_(grad.square())
        return grad / (sums.sqrt() + self.eps)


@dataclass(frozen=True)
class RowWiseAdagrad(UpdateRule):
    """h ← h + mean over the row's stored columns of g²; w ← w - lr · g / (√h + eps); one h per row and column shard."""

    number = 3

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"momentum1": (rows,)}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], t: int) -> Tensor:
        sums = state["momentum1"].add_(grad.square().mean(dim=1))
        return grad / (sums.sqrt() + self.eps).unsqueeze(1)


@dataclass(frozen=True)
class Adam(UpdateRule):
    """m ← β₁ m + (1 - β₁) g; v ← β₂ v + (1 - β₂) g²; w ← w - lr · m̂ / (√v̂ + eps), m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ).

    Only the rows that the batch looked up move, and their m and v; t counts the steps of the table.
    """

    number = 4
    counts_steps = True

    beta1: float = 0.9
    beta2: float = 0.999

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"momentum1": (rows, columns), "exp_avg_sq": (rows, columns)}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], t: int) -> Tensor:
        mean = state["momentum1"].mul_(self.beta1).add_(grad, alpha=1 - self.beta1)
        root = (self._square(grad, state) / (1 - self.beta2**t)).sqrt()
        return mean / (1 - self.beta1**t) / (root + self.eps)

    def _moments(self, t: int) -> tuple[float, float, float, float]:
        return self.beta1, self.beta2, 1 - self.beta1**t, 1 - self.beta2**t

    def _square(self, grad: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return state["exp_avg_sq"].mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)


@dataclass(frozen=True)
class AmsGrad(Adam):
    """`Adam` with u ← max(u, v) and û = u / (1 - β₂ᵗ) in the place of v̂, as ``torch.optim.Adam(amsgrad=True)``."""

    number = 5

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {**super().state_shapes(rows, columns), "max_exp_avg_sq": (rows, columns)}

    def _square(self, grad: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        largest = state["max_exp_avg_sq"]
        return torch.maximum(largest, super()._square(grad, state), out=largest)


@dataclass(frozen=True)
class PartialRowWiseAdam(Adam):
    """`Adam` with one v per row and column shard: v ← β₂ v + (1 - β₂) · mean over the row's stored columns of g²."""

    number = 6

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"momentum1": (rows, columns), "exp_avg_sq": (rows,)}

    def _square(self, grad: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        mean = grad.square().mean(dim=1)
        return state["exp_avg_sq"].mul_(self.beta2).add_(mean, alpha=1 - self.beta2).unsqueeze(1)


@dataclass(frozen=True)
class Lamb(Adam):
    """w ← w - lr · ‖w‖ / ‖r‖ · r, r = `Adam`'s direction + decay · w; norms of a row's stored columns.

    A row whose r is zero stays. (FBGEMM makes it NaN.) A row of zeros stays, as in FBGEMM.
    """

    number = 7

    def _scaled(self, direction: Tensor, weight: Tensor) -> Tensor:
        norm = direction.norm(dim=1, keepdim=True)
        return direction * (weight.norm(dim=1, keepdim=True) / norm).where(norm > 0, 0)


@dataclass(frozen=True)
class PartialRowWiseLamb(Lamb, PartialRowWiseAdam):
    """`Lamb` with the v of `PartialRowWiseAdam`."""

    number = 8


class Update(NamedTuple):
    """One step of the rows of a weight that a batch looked up.

    Args:
        rule: how a row moves.
        state: the rule's state of all rows of the weight, by the names of `UpdateRule.state_shapes`; fp32.
        learning_rate: of this step.
        t: the number of this step, from 1.
    """

    rule: UpdateRule
    state: Mapping[str, Tensor]
    learning_rate: float
    t: int = 1

    def numbers(self) -> list[float]:
        """Returns the `NUMBERS` of the step."""
        return self.rule.numbers(self.learning_rate, self.t)

    def step(self, weight: Tensor, rows: Tensor, grad: Tensor) -> None:
        """Steps ``rows`` (n,) int64, each once, of ``weight`` in place by their gradients (n, columns), in PyTorch."""
        of_rows = {name: value.index_select(0, rows) for name, value in self.state.items()}
        old = weight.index_select(0, rows).float()
        new = self.rule.step(old, grad.float(), of_rows, self.learning_rate, self.t)
        weight.index_copy_(0, rows, new.to(weight.dtype))
        for name, value in of_rows.items():
            self.state[name].index_copy_(0, rows, value)

    def step_some(self, weight: Tensor, rows: Tensor, grad: Tensor) -> None:
        """As `step`, but a row of -1 is none, so that no host waits for the number of rows."""
        if not len(rows):
            return
        # Let a row that is there take the place of those of -1, because it gets the same values however often it steps.
        slots = torch.arange(len(rows), device=rows.device).where(rows >= 0, rows.argmax())
        rows, grad = rows.index_select(0, slots), grad.index_select(0, slots)
        any_row, rows = rows.amax() >= 0, rows.clamp(min=0)
        of_rows = {name: value.index_select(0, rows) for name, value in self.state.items()}
        old = weight.index_select(0, rows).float()
        new = self.rule.step(old, grad.float(), of_rows, self.learning_rate, self.t)
        weight.index_copy_(0, rows, new.where(any_row, old).to(weight.dtype))
        for name, value in of_rows.items():
            self.state[name].index_copy_(0, rows, value.where(any_row, self.state[name].index_select(0, rows)))
