"""The fused optimizers of tables, by the keys of FBGEMM's batched embeddings."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import Tensor, nn
from torchrec.distributed.utils import merge_fused_params, optimizer_type_to_emb_opt_type

from torchrec_qr.ops.update_rules import (
    Adagrad,
    Adam,
    AmsGrad,
    Lamb,
    PartialRowWiseAdam,
    PartialRowWiseLamb,
    RowWiseAdagrad,
    Sgd,
    UpdateRule,
)

OptimizerName = Literal[
    "sgd",
    "adagrad",
    "rowwise_adagrad",
    "adam",
    "amsgrad",
    "partial_rowwise_adam",
    "lamb",
    "partial_rowwise_lamb",
]


class TableOptimizer(NamedTuple):
    """A fused optimizer.

    Args:
        fused_params (dict[str, Any]): its keys in the ``fused_params`` of a sharder.
        rule (type[UpdateRule]): its formula and its state.
    """

    fused_params: dict[str, Any]
    rule: type[UpdateRule]


OPTIMIZERS: dict[str, TableOptimizer] = {
    "sgd": TableOptimizer({"optimizer": EmbOptimType.EXACT_SGD}, Sgd),
    "adagrad": TableOptimizer({"optimizer": EmbOptimType.EXACT_ADAGRAD}, Adagrad),
    "rowwise_adagrad": TableOptimizer({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD}, RowWiseAdagrad),
    "adam": TableOptimizer({"optimizer": EmbOptimType.ADAM}, Adam),
    "amsgrad": TableOptimizer({"optimizer": EmbOptimType.ADAM, "amsgrad": True}, AmsGrad),
    "partial_rowwise_adam": TableOptimizer({"optimizer": EmbOptimType.PARTIAL_ROWWISE_ADAM}, PartialRowWiseAdam),
    "lamb": TableOptimizer({"optimizer": EmbOptimType.LAMB}, Lamb),
    "partial_rowwise_lamb": TableOptimizer({"optimizer": EmbOptimType.PARTIAL_ROWWISE_LAMB}, PartialRowWiseLamb),
}
RULES: dict[EmbOptimType, type[UpdateRule]] = {
    EmbOptimType.SGD: Sgd,
    **{params["optimizer"]: rule for params, rule in OPTIMIZERS.values() if "amsgrad" not in params},
}

# Keys that TorchRec and optimizer classes always pass, with the values that have no effect.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "output_dtype": (SparseType.FP32,),
    "lr_decay": (0,),
    "initial_accumulator_value": (0,),
    "momentum": (0,),
    "dampening": (0,),
    "weight_decay": (0,),
    "weight_decay_mode": (WeightDecayMode.NONE,),
}


# The numbers of a rule: what is allowed, and a test of it, which NaN fails.
_AT_LEAST_0 = ("a finite number of 0 or more", lambda value: 0 <= value < math.inf)
_BELOW_1 = ("a number of 0 or more, and below 1", lambda value: 0 <= value < 1)
_NUMBERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(("learning_rate", "eps", "weight_decay"), _AT_LEAST_0),
    **dict.fromkeys(("beta1", "beta2"), _BELOW_1),
    "max_gradient": ("a number of 0 or more", lambda value: value >= 0),
}


def has_effect(key: str, value: object) -> bool:
    """Returns whether a key of ``fused_params`` has an effect: keys of TorchRec's own and neutral values have none."""
    return not (key.startswith("_") or value is None or value is False or value in _NEUTRAL.get(key, ()))


def merged_fused_params(fused_params: Mapping[str, Any] | None, parameter: nn.Parameter) -> dict[str, Any]:
    """Returns the options that TorchRec merges: those attached to a parameter replace those of its sharder."""
    attached: dict[str, Any] = copy.copy(getattr(parameter, "_optimizer_kwargs", [{}])[0])
    optimizer = getattr(parameter, "_optimizer_classes", [None])[0]
    if optimizer is not None:
        attached["optimizer"] = optimizer_type_to_emb_opt_type(optimizer)
    merged: dict[str, Any] = merge_fused_params(None if fused_params is None else dict(fused_params), attached)
    return merged


def check_decay_of_plain_table(table: str, fused_params: Mapping[str, Any], on_cpu: bool) -> None:
    """Refuses the weight decay of a plain table if FBGEMM drops it.

    Args:
        table (str): the table's name, for errors.
        fused_params (Mapping[str, Any]): the keys of FBGEMM's embeddings.
        on_cpu (bool): whether the table is on a CPU, where FBGEMM's kernel for tables of one feature has no decay.

    Raises:
        NotImplementedError: the decay would have no effect, or another one than its mode.
    """
    amount, optimizer = fused_params.get("weight_decay"), fused_params.get("optimizer", EmbOptimType.EXACT_SGD)
    if not amount or optimizer not in RULES:
        return
    rule, mode = RULES[optimizer], fused_params.get("weight_decay_mode", WeightDecayMode.NONE)
    default = WeightDecayMode.NONE if issubclass(rule, Adam) else WeightDecayMode.L2
    kept = rule not in (Sgd, Adagrad) and mode in (default, WeightDecayMode.DECOUPLE)
    if on_cpu or not kept:
        raise NotImplementedError(
            f"table {table!r}: FBGEMM drops weight_decay={amount!r} with weight_decay_mode={mode!r} of a plain table "
            f"under {optimizer}{' on a CPU' if on_cpu else ''}; allowed: 0, or a compositional table of one partition, "
            "MixedRadix(sizes=[num_embeddings])"
        )


def update_rule(table: str, fused_params: Mapping[str, Any]) -> UpdateRule:
    """Returns the update rule for the ``fused_params`` of a table.

    Supported keys are ``optimizer`` (a key of `RULES`; default SGD), ``learning_rate``, ``eps``, ``beta1`` and
    ``beta2`` of Adam and LAMB (or torch's ``betas``), ``amsgrad`` of Adam, ``weight_decay`` with ``weight_decay_mode``,
    and ``gradient_clipping`` with ``max_gradient``. Weights in fp16 and bf16 are stepped in fp32 and rounded to the
    nearest.

    Clipping applies to the gradient of a row, summed over the batch, so that the plan does not change the result.
    (FBGEMM clips the gradient of the pooled output on CUDA, and does not clip on a CPU.)

    Weight decay moves the rows that a batch looked up, and no others. With λ the decay and η the learning rate, mode L2
    adds λ · w to the gradient, and mode DECOUPLE adds η · λ · w to the step. Rowwise Adagrad has both modes in FBGEMM.
    Adam and LAMB are decoupled there, whatever the mode. SGD and Adagrad have none there, and here rowwise Adagrad's.

    Args:
        table (str): the table's name, for errors.
        fused_params (Mapping[str, Any]): the keys of FBGEMM's embeddings.

    Raises:
        NotImplementedError: the optimizer or a key is not supported.
        ValueError: a number of the rule is none, or is out of its range.

    Example:
        >>> update_rule("t", {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.1})
        Adagrad(learning_rate=0.1, eps=1e-08, max_gradient=None, l2=0.0, decay=0.0)
    """
    given = {k: v for k, v in fused_params.items() if has_effect(k, v)}
    optimizer = given.pop("optimizer", EmbOptimType.EXACT_SGD)
    if optimizer not in RULES:
        raise NotImplementedError(
            f"table {table!r}: optimizer={optimizer} is not supported by compositional tables; "
            f"allowed: {', '.join(str(o) for o in RULES)}"
        )
    rule = RULES[optimizer]
    fields: tuple[str, ...] = ("learning_rate", "eps")
    if issubclass(rule, Adam):
        fields += ("beta1", "beta2")
        if "betas" in given:
            betas = given.pop("betas")
            if not isinstance(betas, Sequence) or len(betas) != 2 or "beta1" in given or "beta2" in given:
                raise ValueError(f"table {table!r}: betas={betas!r}; allowed: two numbers, without beta1 and beta2")
            given["beta1"], given["beta2"] = betas
    if rule is Adam and given.pop("amsgrad", False):
        rule = AmsGrad
    chosen: dict[str, Any] = {k: _number(table, k, given.pop(k)) for k in fields if k in given}
    max_gradient = _number(table, "max_gradient", given.pop("max_gradient", 1.0))
    if given.pop("gradient_clipping", False):
        chosen["max_gradient"] = max_gradient
    chosen |= _weight_decay(table, optimizer, given)
    if given:
        key, value = next(iter(given.items()))
        raise NotImplementedError(
            f"table {table!r}: {key}={value!r} is not supported by compositional tables; allowed: optimizer, "
            "learning_rate, eps, gradient_clipping, max_gradient, weight_decay, weight_decay_mode, of Adam and LAMB "
            "beta1, beta2, betas, and of Adam amsgrad"
        )
    return rule(**chosen)


def _number(table: str, key: str, value: Any) -> Any:
    """Returns a number of the rule if it is in its range."""
    allowed, fits = _NUMBERS[key]
    # Take a tensor too, because torch's optimizers take one as their rate.
    is_number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    if not is_number or isinstance(value, bool) or not fits(value):
        raise ValueError(f"table {table!r}: {key}={value!r}; allowed: {allowed}")
    return value


def _weight_decay(table: str, optimizer: EmbOptimType, given: dict[str, Any]) -> dict[str, float]:
    """Returns the field of a rule for its weight decay, and takes the keys out of ``given``."""
    amount = _number(table, "weight_decay", given.pop("weight_decay", 0))
    mode = given.pop("weight_decay_mode", WeightDecayMode.NONE)
    # FBGEMM decouples the decay of Adam and LAMB if no mode is given. It drops that of the others.
    default = WeightDecayMode.NONE if issubclass(RULES[optimizer], Adam) else WeightDecayMode.L2
    allowed = default, WeightDecayMode.DECOUPLE
    if mode not in allowed and (amount or mode != WeightDecayMode.NONE):
        raise NotImplementedError(
            f"table {table!r}: weight_decay={amount!r} with weight_decay_mode={mode!r} is not supported for "
            f"{optimizer} by compositional tables; allowed: {' or '.join(f'WeightDecayMode.{m.name}' for m in allowed)}"
        )
    return {"l2" if mode == WeightDecayMode.L2 else "decay": float(amount)}
