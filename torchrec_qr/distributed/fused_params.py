"""The optimizers of tables, and that of a table as TorchRec attaches it: by keys of FBGEMM's batched embeddings."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType

from torchrec_qr.ops.update_rules import Adagrad, Adam, AmsGrad, RowWiseAdagrad, Sgd, UpdateRule

OptimizerName = Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "amsgrad"]


class TableOptimizer(NamedTuple):
    """An optimizer of tables.

    Args:
        fused_params (dict[str, Any]): its name in the ``fused_params`` of a sharder.
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
}
RULES: dict[EmbOptimType, type[UpdateRule]] = {
    EmbOptimType.SGD: Sgd,
    **{params["optimizer"]: rule for params, rule in OPTIMIZERS.values() if "amsgrad" not in params},
}

# Keys that TorchRec and optimizer classes pass in any case, by the values that change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "output_dtype": (SparseType.FP32,),
    "lr_decay": (0,),
    "initial_accumulator_value": (0,),
    "momentum": (0,),
    "dampening": (0,),
    "weight_decay": (0,),
}


def says_something(key: str, value: object) -> bool:
    """Returns whether a key of ``fused_params`` changes anything: no note of TorchRec's, and not at a neutral value."""
    return not (key.startswith("_") or value is None or value is False or value in _NEUTRAL.get(key, ()))


def update_rule(table: str, fused_params: Mapping[str, Any]) -> UpdateRule:
    """Returns the rule of the optimizer that TorchRec attached to a table, by the keys of FBGEMM's embeddings.

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
