"""Models and rules that `compress_` refuses, by name, and leaves as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_compress import QR, TwoKinds, bags
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.utils import parametrize
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.inference.modules import quantize_embeddings
from torchrec.modules.fused_embedding_modules import fuse_embedding_optimizer
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from torchrec_qr import HashPartition, MixedRadix, QuotientRemainder, compress_


def refused(message: str, model: nn.Module | None = None, kind: type[Exception] = ValueError, **given: Any) -> None:
    """Checks that the call is refused, and that the model is the same after it."""
    model = TwoKinds() if model is None else model
    given = {"partitions": QR, "min_rows": 100, **given}
    before = dict(model.named_modules()), dict(model.named_parameters())
    with pytest.raises(kind, match=message):
        compress_(model, **given)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    assert all(modules[name] is module for name, module in before[0].items())
    assert all(parameters[name] is parameter for name, parameter in before[1].items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 100}, r"partitions=.* and budget=100 are both given"),
        ({"partitions": None}, "nothing chooses a compression"),
        ({"tables": {"t_users": QR}}, "tables has 't_users', which is no table of the model; allowed: t_user"),
        ({"tables": {"x": None}}, "tables has 'x', .* allowed: t_user, t_day, t_item, t_word, t_tag"),
        ({"tables": {"t_day": HashPartition(rows=7)}}, r"table 't_day' of 'bags': .* stores 7 rows, 112 bytes"),
        (
            {"partitions": MixedRadix(sizes=[1_000, 1_000])},
            r"table 't_user' of 'bags': .* stores 2,000 rows",
        ),
        ({"min_rows": 5}, "table 't_day': QuotientRemainder: num_collisions must be between 1 and 7"),
        ({"min_rows": 3_000}, "no table is compressed by .* min_rows=3000 .*'t_user': 1000"),
        ({"operation": "sum"}, "operation='sum'; allowed: mult, add, concat, path"),
        ({"min_rows": -1}, "min_rows must be at least 0, got -1"),
        ({"partitions": None, "budget": 0}, "budget must be at least 1, got 0"),
        ({"partitions": None, "budget": 4_000}, r"budget=4000 bytes is too small: .* 3 tables .* store 5008 bytes"),
        ({"partitions": None, "budget": 9_000, "operation": "path"}, "operation='path' with budget=9000"),
        ({"frequencies": {"t_user": torch.ones(1_000)}}, r"frequencies has \['t_user'\]; allowed: .* none"),
        ({"fit": True, "frequencies": {"t_day": torch.ones(7)}}, r"\['t_day'\]; allowed: .* t_item, t_user, t_word"),
        ({"fit": True, "frequencies": {"t_user": torch.ones(7)}}, r"table 't_user': frequencies have shape \(7,\)"),
    ],
)
def test_rules_that_cannot_hold(given: dict[str, Any], message: str) -> None:
    refused(message, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"partitions": 4}, "partitions=4; allowed: None or a spec"),
        ({"tables": ["t_user"]}, r"tables=\['t_user'\]; allowed: None or a mapping"),
        ({"tables": {"t_user": 4.0}}, r"tables\['t_user'\]=4.0; allowed: None or a spec"),
        ({"partitions": None, "budget": 1e6}, "budget must be an int, got 1000000.0"),
        ({"min_rows": "7"}, "min_rows must be an int, got '7'"),
    ],
)
def test_values_of_another_type(given: dict[str, Any], message: str) -> None:
    refused(message, kind=TypeError, **given)


def test_path_cannot_be_fitted() -> None:
    refused("table 't_user': operation='path' cannot be fitted", kind=NotImplementedError, operation="path", fit=True)


def test_fields_without_a_meaning_for_partitions() -> None:
    model = TwoKinds(need_pos=True)
    refused("table 't_user': need_pos=True is not supported", model, NotImplementedError)


@pytest.mark.parametrize("build", [lambda: EmbeddingBagCollection(tables=bags()), lambda: TwoKinds().words])
def test_a_collection_itself(build: Callable[[], nn.Module]) -> None:
    refused(r"the model is itself of class Embedding(Bag)?Collection.*holder = nn.ModuleList", build(), TypeError)


def test_models_without_collections() -> None:
    refused("Linear contains no EmbeddingBagCollection", nn.Linear(2, 2))


class Subclass(EmbeddingBagCollection):
    """A user's own."""


def subclassed() -> nn.Module:
    return nn.ModuleDict({"own": Subclass(tables=bags())})


def quantised() -> nn.Module:
    return quantize_embeddings(nn.ModuleDict({"own": EmbeddingBagCollection(tables=bags())}), torch.qint8, inplace=True)


def fused() -> nn.Module:
    model = nn.ModuleDict({"own": EmbeddingBagCollection(tables=bags())})
    return fuse_embedding_optimizer(model, torch.optim.SGD, {"lr": 0.1}, torch.device("cpu"))


@pytest.mark.parametrize("build", [subclassed, quantised, fused])
def test_collections_of_other_classes(build: Callable[[], nn.Module]) -> None:
    model = build()
    refused(rf"'own' is a {type(model['own']).__module__}.*; allowed: TorchRec's EmbeddingBagCollection", model)


def test_managed_collisions_in_front_of_compressed_tables() -> None:
    def model() -> nn.Module:
        tables = [EmbeddingBagConfig(name="t", feature_names=["f"], num_embeddings=200, embedding_dim=4)]
        eviction = DistanceLFU_EvictionPolicy()
        modules = {
            "t": MCHManagedCollisionModule(
                zch_size=200, device=torch.device("cpu"), eviction_interval=1, eviction_policy=eviction
            )
        }
        collisions = ManagedCollisionCollection(modules, tables)
        return nn.ModuleList(
            [ManagedCollisionEmbeddingBagCollection(EmbeddingBagCollection(tables=tables), collisions), TwoKinds()]
        )

    refused(r"'0._embedding_module' with the tables \['t'\] .* a ManagedCollisionEmbeddingBagCollection", model())
    plain = model()
    compress_(plain, QR, min_rows=100, tables={"t": None})
    assert plain[0]._embedding_module.embedding_bags["t"].weight.shape == (200, 4)


def test_weights_that_another_module_shares() -> None:
    model = TwoKinds()
    model.head = nn.Linear(8, 300, bias=False)
    model.head.weight = model.words.embeddings["t_word"].weight
    message = r"table 't_word' of 'arch.words.1' is .* arch.words.1.embeddings.t_word.weight, head.weight"
    refused(message, model)
    compress_(model, QR, min_rows=100, tables={"t_word": None})
    assert model.head.weight is model.words.embeddings["t_word"].weight


def test_tables_that_two_collections_share() -> None:
    model = nn.ModuleList([EmbeddingBagCollection(tables=bags()) for _ in range(2)])
    model[1].embedding_bags["t_item"] = model[0].embedding_bags["t_item"]
    refused("table 't_item' of '0' is .* 0.embedding_bags.t_item, 1.embedding_bags.t_item", model)


@pytest.mark.parametrize("hold", [lambda x: x, lambda x: [x], lambda x: {"a": x}, lambda x: x.forward])
def test_references_that_are_no_child_modules(hold: Callable[[Any], Any]) -> None:
    model = TwoKinds()
    object.__setattr__(model, "fast", hold(model.bags))
    refused("fast refers to 'bags', which is replaced, outside of the child modules", model)
    model = TwoKinds()
    object.__setattr__(model.arch, "rows", hold(model.words.embeddings["t_word"]))
    refused("table 't_word' of 'arch.words.1' is .* arch.rows, ", model)


def test_hooks_that_would_be_lost() -> None:
    model = TwoKinds()
    handle = model.bags.register_forward_hook(lambda *_: None)
    refused("'bags' has _forward_hooks, which would be lost", model)
    handle.remove()
    handle = model.bags.embedding_bags["t_day"].register_full_backward_hook(lambda *_: None)
    refused("table 't_day' of 'bags' has _backward_hooks", model)
    handle.remove()
    handle = model.words.embeddings["t_word"].weight.register_hook(lambda grad: grad)
    refused("the weight of table 't_word' of 'arch.words.1' has _backward_hooks", model)
    handle.remove()
    model.words.embeddings["t_tag"].weight.register_hook(lambda grad: grad)  # that of a plain table stays
    compress_(model, QR, min_rows=100)


def test_frozen_tables_that_would_become_random() -> None:
    model = TwoKinds().requires_grad_(False)
    refused(r"table 't_user' of 'bags' is frozen .*fit=True, tables=\{'t_user': None\}", model)
    compress_(model, QR, min_rows=100, fit=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_meta_tables_have_nothing_to_fit() -> None:
    refused("table 't_user' of 'bags' is on the meta device, and fit=True needs", TwoKinds("meta"), fit=True)


def test_optimizers_in_backward_that_were_replaced() -> None:
    model = TwoKinds()
    weight = model.bags.embedding_bags["t_user"].weight
    _apply_optimizer_in_backward(torch.optim.SGD, [weight], {"lr": 0.1})
    weight._in_backward_optimizers[0] = torch.optim.Adam([weight])
    refused(r"table 't_user' of 'bags' has the optimizers in backward \['Adam'\]", model)


def test_tables_that_are_not_what_their_config_describes() -> None:
    model = TwoKinds()
    model.bags.embedding_bags["t_day"].weight = nn.Parameter(torch.zeros(8, 4))
    refused(r"the weight of table 't_day' of 'bags' has shape \(8, 4\)", model)
    model = TwoKinds().double()
    refused("the weight of table 't_user' of 'bags' has .* torch.float64; allowed .* torch.float32", model)
    model = TwoKinds()
    parametrize.register_parametrization(model.bags.embedding_bags["t_item"], "weight", nn.Identity())
    refused("table 't_item' of 'bags' is a ParametrizedEmbeddingBag", model)


def test_tables_that_are_compositional_already() -> None:
    model = TwoKinds()
    compress_(model, QR, min_rows=100)
    model.more = EmbeddingBagCollection(tables=bags()[:1])
    refused(
        "tables has 't_word', which is in 'arch.words.1', a CompositionalEmbeddingCollection already",
        model,
        tables={"t_word": QuotientRemainder(num_collisions=20)},
    )
    refused("no table .* stay as they are: t_user, t_day, t_item; allowed: a rule for one", nn.ModuleList([model.bags]))
