"""Exact optimizer steps on the rows that a batch touched: the same rule wherever a partition lies.

Formulas are FBGEMM's (``EmbOptimType``): one step per row and batch, from the gradient summed over the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torch import Tensor


@dataclass(frozen=True)
class UpdateRule(ABC):
    """w ← w - lr · direction(g), g the gradient of a row, its entries clipped to ±max_gradient."""

    # In `torchrec_qr.ops.arguments.RULES`.
    name: ClassVar[str]
    # Whether a step moves a row whose gradient is zero, and depends on the number t of steps so far.
    counts_steps: ClassVar[bool] = False

    learning_rate: float = 0.01
    eps: float = 1e-8
    max_gradient: float | None = None

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
        return weight - lr * self.direction(grad, state, t)

    def numbers(self, lr: float, t: int) -> list[float]:
        """The numbers of step t, as the kernels take them (``cpu_structs.HYPER``); no limit: -1."""
        limit = -1.0 if self.max_gradient is None else self.max_gradient
        return [lr, self.eps, 0.0, 0.0, 1.0, 1.0, limit]


@dataclass(frozen=True)
class Sgd(UpdateRule):
    """w ← w - lr · g."""

    name = "sgd"

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], t: int) -> Tensor:
        return grad


@dataclass(frozen=True)
class Adagrad(UpdateRule):
    """h ← h + g²; w ← w - lr · g / (√h + eps)."""

    name = "adagrad"

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"momentum1": (rows, columns)}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], t: int) -> Tensor:
        sums = state["momentum1"].add_(grad.square())
        return grad / (sums.sqrt() + self.eps)


@dataclass(frozen=True)
class RowWiseAdagrad(UpdateRule):
    """h ← h + mean over the row's stored columns of g²; w ← w - lr · g / (√h + eps); one h per row and column shard."""

    name = "rowwise_adagrad"

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

    name = "adam"
    counts_steps = True

    beta1: float = 0.9
    beta2: float = 0.999

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"momentum1": (rows, columns), "exp_avg_sq": (rows, columns)}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], t: int) -> Tensor:
        mean = state["momentum1"].mul_(self.beta1).add_(grad, alpha=1 - self.beta1)
        square = state["exp_avg_sq"].mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        root = (self._bound(square, state) / (1 - self.beta2**t)).sqrt()
        return mean / (1 - self.beta1**t) / (root + self.eps)

    def numbers(self, lr: float, t: int) -> list[float]:
        lr, eps, _, _, _, _, limit = super().numbers(lr, t)
        return [lr, eps, self.beta1, self.beta2, 1 - self.beta1**t, 1 - self.beta2**t, limit]

    def _bound(self, square: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return square


@dataclass(frozen=True)
class AmsGrad(Adam):
    """`Adam` with u ← max(u, v) and û = u / (1 - β₂ᵗ) in the place of v̂, as ``torch.optim.Adam(amsgrad=True)``."""

    name = "amsgrad"

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {**super().state_shapes(rows, columns), "max_exp_avg_sq": (rows, columns)}

    def _bound(self, square: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        largest = state["max_exp_avg_sq"]
        return torch.maximum(largest, square, out=largest)


RULES: dict[EmbOptimType, type[UpdateRule]] = {
    EmbOptimType.SGD: Sgd,
    EmbOptimType.EXACT_SGD: Sgd,
    EmbOptimType.EXACT_ADAGRAD: Adagrad,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: RowWiseAdagrad,
    EmbOptimType.ADAM: Adam,
}

# Keys with which TorchRec and optimizer classes say "nothing special", by the values that say so.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "output_dtype": (SparseType.FP32,),
    "lr_decay": (0,),
    "initial_accumulator_value": (0,),
    "momentum": (0,),
    "dampening": (0,),
    "weight_decay": (0,),
}


def says_something(key: str, value: object) -> bool:
    """Whether a key of ``fused_params`` asks for anything: neither TorchRec's own note nor at its neutral value."""
    return not (key.startswith("_") or value is None or value is False or value in _NEUTRAL.get(key, ()))


def update_rule(table: str, fused_params: Mapping[str, Any]) -> UpdateRule:
    """Reads the optimizer that TorchRec attached to a table, in the words of FBGEMM's table-batched embeddings.

    Honoured: ``optimizer`` (exact SGD, Adagrad, rowwise Adagrad, Adam; default SGD), ``learning_rate``, ``eps``, of
    Adam ``beta1`` and ``beta2`` (or torch's ``betas``) and ``amsgrad``, and ``gradient_clipping`` with
    ``max_gradient``, which clips the gradient of a row, as summed over the batch: so the plan does not change the
    result. (FBGEMM clips that of the pooled output, on CUDA, and ignores it on a CPU.) Weights in fp16 and bf16 are
    stepped in fp32 and rounded to the nearest.

    Raises:
        NotImplementedError: another optimizer or key, by name; nothing is dropped in silence.

    Example:
        >>> update_rule("t", {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.1})
        Adagrad(learning_rate=0.1, eps=1e-08, max_gradient=None)
    """
    given = {k: v for k, v in fused_params.items() if says_something(k, v)}
    optimizer = given.pop("optimizer", EmbOptimType.EXACT_SGD)
    if optimizer not in RULES:
        raise NotImplementedError(
            f"table {table!r}: optimizer={optimizer} is not supported by compositional tables; "
            f"allowed: {', '.join(str(o) for o in RULES)}"
        )
    rule = RULES[optimizer]
    fields: tuple[str, ...] = ("learning_rate", "eps")
    if rule is Adam:
        fields += ("beta1", "beta2")
        if "betas" in given:
            given["beta1"], given["beta2"] = given.pop("betas")
        if given.pop("amsgrad", False):
            rule = AmsGrad
    chosen: dict[str, Any] = {k: given.pop(k) for k in fields if k in given}
    max_gradient = given.pop("max_gradient", 1.0)
    if given.pop("gradient_clipping", False):
        chosen["max_gradient"] = max_gradient
    if given:
        key, value = next(iter(given.items()))
        raise NotImplementedError(
            f"table {table!r}: {key}={value!r} is not supported by compositional tables; allowed: optimizer, "
            "learning_rate, eps, gradient_clipping, max_gradient, and of Adam beta1, beta2, betas, amsgrad"
        )
    return rule(**chosen)
