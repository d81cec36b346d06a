"""The optimizer of compositional tables: how it is given, what it refuses; it does the same under every plan."""

import inspect
import re
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from assert_all_close import assert_all_close
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from parity_model import Run, TableCase, one_of_each, shard_run
from pieces import Pieces, assembled, pieces_of
from placements import BASIC_SHARDINGS
from ranks import run_ranks
from sharded_model import EPS, LR, Model, loss_of, own_state, own_weights
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.optimizers import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    LarsSGD,
    PartialRowWiseAdam,
    in_backward_optimizer_filter,
)

from torchrec_qr.distributed.fused_params import (
    OPTIMIZERS,
    RULES,
    OptimizerName,
    check_decay_of_plain_table,
    update_rule,
)
from torchrec_qr.ops.update_rules import Adam as AdamRule

RUN = Run(one_of_each(BASIC_SHARDINGS, plan="hand"))
ALL_AS = {s: Run(tuple(TableCase(t, "strided", s, plan="hand") for t in ("a", "b"))) for s in BASIC_SHARDINGS}


def sharded(run: Run, fused_params: dict[str, Any] | None = None, attach: Any = None) -> DistributedModelParallel:
    """The run's model by a hand-written plan; ``attach`` is called with the collection beforehand."""
    collection = run.collection("meta")
    if attach is not None:
        attach(collection)
    return shard_run(run, run.sharders(fused_params or {}), collection)


def backward(dmp: nn.Module, run: Run, step: int = 0, scale: float = 1.0) -> None:
    world_size = dist.get_world_size()
    kjt = run.own_batch(step)
    (scale * loss_of(dmp(kjt), world_size)).backward()


States = tuple[dict[str, Pieces], dict[str, Pieces]]


def attached_or_by_params(rank: int, world_size: int) -> dict[str, tuple[States, States]]:
    out = {}
    amsgrad = {"betas": (0.7, 0.9), "amsgrad": True}
    given: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], EmbOptimType]] = {
        "sgd": (torch.optim.SGD, {"lr": LR}, EmbOptimType.EXACT_SGD),
        "torchrec sgd": (SGD, {"lr": LR}, EmbOptimType.EXACT_SGD),
        "adagrad": (torch.optim.Adagrad, {"lr": LR, "eps": EPS}, EmbOptimType.EXACT_ADAGRAD),
        "torchrec adagrad": (Adagrad, {"lr": LR, "eps": EPS}, EmbOptimType.EXACT_ADAGRAD),
        "rowwise": (RowWiseAdagrad, {"lr": LR, "eps": EPS}, EmbOptimType.EXACT_ROWWISE_ADAGRAD),
        "adam": (torch.optim.Adam, {"lr": LR, "eps": EPS}, EmbOptimType.ADAM),
        "torchrec adam": (Adam, {"lr": LR, "eps": EPS}, EmbOptimType.ADAM),
        "amsgrad": (torch.optim.Adam, {"lr": LR, "eps": EPS, **amsgrad}, EmbOptimType.ADAM),
        "partial rowwise adam": (PartialRowWiseAdam, {"lr": LR, "eps": EPS}, EmbOptimType.PARTIAL_ROWWISE_ADAM),
        "lamb": (LAMB, {"lr": LR, "eps": EPS}, EmbOptimType.LAMB),
    }
    for name, (optimizer, kwargs, kind) in given.items():

        def attach(module: nn.Module, optimizer: Any = optimizer, kwargs: Any = kwargs) -> None:
            _apply_optimizer_in_backward(optimizer, module.parameters(), dict(kwargs))

        of_both = []
        by_params = {"optimizer": kind, "learning_rate": LR, "eps": EPS}
        if name == "amsgrad":
            by_params |= {"beta1": 0.7, "beta2": 0.9, "amsgrad": True}
        for dmp in (sharded(RUN, attach=attach), sharded(RUN, by_params)):
            for step in range(2):
                backward(dmp, RUN, step)
            of_both.append((own_weights(dmp), own_state(dmp)))
        out[name] = (of_both[0], of_both[1])
    return out


def test_attached_and_by_params_are_one() -> None:
    ranks = run_ranks(attached_or_by_params, 2)
    initial = RUN.initial().state_dict()
    for name in ranks[0]:
        for i in (0, 1):  # weights, optimizer state
            attached, by_params = (assembled([rank[name][way][i] for rank in ranks]) for way in (0, 1))
            assert attached.keys() == by_params.keys()
            for key, value in attached.items():
                assert torch.equal(value, by_params[key]), (name, key)
                if i == 0:
                    assert not torch.equal(value, initial[key.removeprefix("collection.")].double()), (name, key)
        states = [] if "sgd" in name else ["momentum1"]
        states += ["exp_avg_sq", "step"] if any(of in name for of in ("adam", "amsgrad", "lamb")) else []
        states += ["max_exp_avg_sq"] if name == "amsgrad" else []
        assert set(attached) == {
            f"collection.embedding_bags.{s}.partition_{j}.weight {s}.partition_{j}.{state}"
            for s in BASIC_SHARDINGS
            for j in (0, 1)
            for state in states
        }, name


# The values by which each key says something: another type of value would be refused for the type.
_HONOURED = {"optimizer", "learning_rate", "eps", "gradient_clipping", "max_gradient"}
_HONOURED |= {"weight_decay", "weight_decay_mode"}
_BY_THE_KERNEL = {"self", "embedding_specs"}
_TELLING: dict[str, Any] = {"momentum": 0.5, "output_dtype": SparseType.FP16}
KEYS = [
    key
    for key in inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.__init__).parameters
    if key not in _HONOURED | _BY_THE_KERNEL
]


@pytest.mark.parametrize("key", KEYS)
def test_other_keys_raise(key: str) -> None:
    """Every key that FBGEMM has, now and later: what is not honoured is refused."""
    value = _TELLING.get(key, 0.75)
    with pytest.raises(NotImplementedError, match=rf"table 't_user': {key}=.*; allowed: optimizer, learning_rate"):
        update_rule("t_user", {"optimizer": EmbOptimType.EXACT_SGD, key: value})


MODES = {None: "", WeightDecayMode.NONE: "", WeightDecayMode.L2: "l2", WeightDecayMode.DECOUPLE: "decay"}


@pytest.mark.parametrize("mode", [None, *WeightDecayMode])
@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_weight_decay_has_fbgemms_meaning_or_is_refused(name: str, mode: WeightDecayMode | None) -> None:
    """FBGEMM decouples the decay of Adam and LAMB without a mode too, and drops that of the others."""
    params, rule = OPTIMIZERS[name]
    params = {**params, "weight_decay": 0.1} | ({} if mode is None else {"weight_decay_mode": mode})
    field = MODES.get(mode, "refused")
    if issubclass(rule, AdamRule):
        field = {"": "decay", "l2": "refused"}.get(field, field)
    if field in ("", "refused"):
        allowed = "WeightDecayMode.NONE or" if issubclass(rule, AdamRule) else "WeightDecayMode.L2 or"
        with pytest.raises(NotImplementedError, match=f"table 't': weight_decay=0.1 with .*; allowed: {allowed}"):
            update_rule("t", params)
        return
    found = update_rule("t", params)
    assert {of: getattr(found, of) for of in ("l2", "decay")} == {"l2": 0.0, "decay": 0.0} | {field: 0.1}


@pytest.mark.parametrize("mode", WeightDecayMode)
@pytest.mark.parametrize("kind", [EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.ADAM])
def test_weight_decay_that_fbgemm_drops_is_refused_for_plain_tables(kind: EmbOptimType, mode: WeightDecayMode) -> None:
    """`tests/ops/test_fbgemm_steps.py` shows that it drops it on a CPU."""
    params = {"optimizer": kind, "weight_decay": 0.1, "weight_decay_mode": mode}
    refused = rf"table 'p': FBGEMM drops weight_decay=0\.1 .* under {kind}"
    with pytest.raises(NotImplementedError, match=rf"{refused} on a CPU; allowed: 0, or a compositional"):
        check_decay_of_plain_table("p", params, on_cpu=True)
    kept = {
        EmbOptimType.EXACT_ROWWISE_ADAGRAD: (WeightDecayMode.L2, WeightDecayMode.DECOUPLE),
        EmbOptimType.ADAM: (WeightDecayMode.NONE, WeightDecayMode.DECOUPLE),
    }
    if mode in kept.get(kind, ()):
        check_decay_of_plain_table("p", params, on_cpu=False)
        return
    with pytest.raises(NotImplementedError, match=f"{refused};"):
        check_decay_of_plain_table("p", params, on_cpu=False)


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_the_table_of_optimizers_has_every_name(name: str) -> None:
    params, rule = OPTIMIZERS[name]
    assert type(update_rule("t_user", params)) is rule
    assert OPTIMIZERS.keys() == set(get_args(OptimizerName))


@pytest.mark.parametrize("kind", [kind for kind in EmbOptimType if kind not in RULES], ids=str)
def test_other_optimizers_raise(kind: EmbOptimType) -> None:
    with pytest.raises(NotImplementedError, match=f"table 't_user': optimizer={kind} is not supported"):
        update_rule("t_user", {"optimizer": kind})


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        *(
            (key, value, "a finite number of 0 or more")
            for key in ("learning_rate", "eps", "weight_decay")
            for value in (-0.1, float("nan"), float("inf"), "0.1", True)
        ),
        *(
            (key, value, "a number of 0 or more, and below 1")
            for key in ("beta1", "beta2")
            for value in (1.0, -0.1, float("nan"))
        ),
        *(("max_gradient", value, "a number of 0 or more") for value in (-1.0, float("nan"))),
        *(("betas", value, "two numbers, without beta1 and beta2") for value in ((0.9,), 0.9)),
    ],
)
def test_numbers_out_of_their_range_are_refused(key: str, value: object, allowed: str) -> None:
    params = {"optimizer": EmbOptimType.ADAM, "gradient_clipping": True, key: value}
    with pytest.raises(ValueError, match=re.escape(f"table 't': {key}={value!r}; allowed: {allowed}")):
        update_rule("t", params)


def test_numbers_at_the_ends_of_their_ranges_are_taken() -> None:
    zeros = dict.fromkeys(("learning_rate", "eps", "weight_decay", "beta1", "beta2", "max_gradient"), 0)
    rule = update_rule("t", {"optimizer": EmbOptimType.ADAM, "gradient_clipping": True} | zeros)
    assert rule == AdamRule(0, 0, 0, beta1=0, beta2=0)
    assert update_rule("t", {"gradient_clipping": True, "max_gradient": float("inf")}).max_gradient == float("inf")
    with pytest.raises(ValueError, match=r"table 't': betas=\(0\.9, 0\.99\); allowed: two numbers, without beta1"):
        update_rule("t", {"optimizer": EmbOptimType.ADAM, "betas": (0.9, 0.99), "beta2": 0.5})


def refused(rank: int, world_size: int) -> list[str]:
    messages = []
    for sharding in BASIC_SHARDINGS:
        # The last: said of a table whose kernel is dense, it must not be dropped either.
        for params in (
            {"optimizer": EmbOptimType.LARS_SGD},
            {"optimizer": EmbOptimType.EXACT_SGD, "weight_decay": 0.1},
            {"output_dtype": SparseType.FP16},
        ):
            with pytest.raises(NotImplementedError) as error:
                sharded(ALL_AS[sharding], params)
            messages.append(str(error.value))
    plain = Run((TableCase("p", "plain", "table_wise", plan="hand"),))
    with pytest.raises(NotImplementedError, match=r"table 'p': FBGEMM drops weight_decay=0\.1"):
        sharded(plain, {"optimizer": EmbOptimType.EXACT_SGD, "weight_decay": 0.1})
    with pytest.raises(NotImplementedError) as error:
        sharded(
            ALL_AS["table_wise"],
            attach=lambda m: _apply_optimizer_in_backward(LarsSGD, m.parameters(), {"lr": LR}),
        )
    messages.append(str(error.value))
    return messages


def test_refused_under_every_plan() -> None:
    (messages,) = run_ranks(refused, 1)
    names = [
        "lars_sgd",
        "weight_decay=0.1 with weight_decay_mode=<WeightDecayMode.NONE: 0>",
        f"output_dtype={SparseType.FP16!r}",
    ] * len(BASIC_SHARDINGS)
    names += ["lars_sgd"]
    for message, name in zip(messages, names, strict=True):
        assert message.startswith("table 'a': ")
        assert f"{name} is not supported" in message


def dense(rank: int, world_size: int) -> tuple[dict[str, Pieces], dict[str, Any], list[str], list[str]]:
    """Gradients without any optimizer attached, and names of fused and dense parameters with one."""
    run = ALL_AS["data_parallel"]
    dmp = sharded(run)
    backward(dmp, run)
    named = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    gradients = {name: pieces_of(p.grad) for name, p in named.items() if p.grad is not None}
    torch.optim.SGD(named.values(), lr=LR).step()
    fused = sharded(RUN, {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": LR})
    included = [name for name, _ in in_backward_optimizer_filter(fused.named_parameters(), include=True)]
    rest = [name for name, _ in in_backward_optimizer_filter(fused.named_parameters())]
    return own_weights(dmp), gradients, included, rest


def expected_after_sgd(run: Run) -> dict[str, torch.Tensor]:
    module = run.initial()
    model = Model(module)
    loss_of(model(run.batch(0).kjt(weighted=False)), 1).backward()
    return {f"collection.{k}": (p - LR * p.grad).detach().double() for k, p in module.named_parameters()}


def test_without_an_optimizer_data_parallel_tables_are_ordinary_parameters() -> None:
    ranks = run_ranks(dense, 2)
    weights = assembled([rank[0] for rank in ranks])
    gradients = assembled([rank[1] for rank in ranks])  # equal on all ranks
    expected = expected_after_sgd(ALL_AS["data_parallel"])
    assert set(gradients) == set(expected)
    assert_all_close(weights, expected, "", 1e-5, 1e-6)
    for _, _, included, rest in ranks:
        assert rest == []
        assert {name.split(".")[2] for name in included} == set(BASIC_SHARDINGS)
