"""Models of TorchRec, compressed, and trained on two ranks as unsharded: all losses and weights are the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from placements import placement, plan_of
from ranks import run_ranks
from sharded_model import LR, SGD, sharders_of, weights_of
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec_models import DENSE, D, NextItem, TwoTower, deepfm, dlrm, dlrm_dcn, dlrm_projection

from torchrec_qr import MixedRadix, QuotientRemainder, compress_
from torchrec_qr.compression.found_collections import FoundCollection, collections_in

STEPS, SAMPLES = 3, 16
SIZES = {"user": 101, "item": 60, "shop": 40, "day": 7}


def bags(*names: str) -> EmbeddingBagCollection:
    """Tables of one feature each."""
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"t_{n}", feature_names=[n], num_embeddings=SIZES[n], embedding_dim=D)
            for n in names
        ]
    )


def items() -> EmbeddingCollection:
    table = EmbeddingConfig(name="t_item", feature_names=["history", "target"], num_embeddings=60, embedding_dim=D)
    return EmbeddingCollection(tables=[table])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "DLRM": lambda: dlrm(bags(*SIZES)),
    "DLRM_DCN": lambda: dlrm_dcn(bags(*SIZES)),
    "DLRM_Projection": lambda: dlrm_projection(bags(*SIZES)),
    "SimpleDeepFMNN": lambda: deepfm(bags(*SIZES)),
    "TwoTower": lambda: TwoTower(bags("user", "day"), bags("item", "shop")),
    "NextItem": lambda: NextItem(items()),
}


def compressed(name: str, operation: Any) -> nn.Module:
    """The same model on every rank, with rows of such sizes that a wrong one shows in the loss."""
    torch.manual_seed(0)
    model = MODELS[name]()
    by_name = {} if name == "NextItem" else {"t_item": MixedRadix(balanced=True, num_partitions=3)}
    compress_(model, QuotientRemainder(num_collisions=5), operation=operation, min_rows=30, tables=by_name)
    with torch.no_grad():
        for found in collections_in(model):
            for weight in found.module.parameters():
                weight.uniform_(0.2, 0.8)
    return model


def batch_of(step: int, rank: int, world_size: int) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
    """The samples of one rank. Histories have one to four items, and each other feature one id."""
    generator = torch.Generator().manual_seed(step)
    own = slice(rank * SAMPLES // world_size, (rank + 1) * SAMPLES // world_size)
    dense, labels = torch.rand(SAMPLES, DENSE, generator=generator), torch.randint(2, (SAMPLES,), generator=generator)
    features: dict[str, tuple[Tensor, Tensor]] = {}
    for name, size in {**SIZES, "target": 60, "history": 60}.items():
        lengths = torch.randint(1, 5 if name == "history" else 2, (SAMPLES,), generator=generator)
        bags_of = torch.randint(size, (int(lengths.sum()),), generator=generator).split(lengths.tolist())
        features[name] = torch.cat(bags_of[own]), lengths[own]
    values, counts = zip(*features.values(), strict=True)
    sparse = KeyedJaggedTensor(list(features), torch.cat(values), lengths=torch.cat(counts))
    return dense[own], sparse, labels[own].float()


def loss_of(model: nn.Module, inside: nn.Module, data: tuple[Tensor, KeyedJaggedTensor, Tensor]) -> Tensor:
    dense, sparse, labels = data
    out = model(dense, sparse).squeeze(1)
    # DeepFM ends in a sigmoid, the others in logits.
    loss = binary_cross_entropy if isinstance(inside, SimpleDeepFMNN) else binary_cross_entropy_with_logits
    return loss(out, labels)


def plan_for(found: FoundCollection, sharder: Any) -> Any:
    """Compositional tables in turn under each sharding type, and plain tables table-wise."""
    types = ("row_wise", "column_wise", "table_wise", "data_parallel")
    chosen = {
        c.name: placement(types[i % 4] if hasattr(c, "partitions") else "table_wise", i, D, width=4)
        for i, c in enumerate(found.configs)
    }
    return plan_of(found.module, chosen, sharder)


def losses(rank: int, world_size: int, cases: list[tuple[str, str]]) -> list[tuple[list[float], list[float]]]:
    """Returns this rank's losses of each model, sharded, and those of all samples, unsharded.

    It checks that both end with the same weights, and that all partitions and tables have been trained.
    """
    return [_losses(rank, world_size, *case) for case in cases]


def _losses(rank: int, world_size: int, name: str, operation: str) -> tuple[list[float], list[float]]:
    reference = compressed(name, operation)
    model, sharders = copy.deepcopy(reference), sharders_of({"optimizer": SGD, "learning_rate": LR})
    plan = {
        found.path: plan_for(found, sharders[0] if found.is_pooled else sharders[1]) for found in collections_in(model)
    }
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=ShardingPlan(plan), sharders=sharders)
    sharded.load_state_dict({key: value.clone() for key, value in reference.state_dict().items()})
    in_backward = set(sharded.fused_optimizer.params)
    rest = {key: p for key, p in sharded.named_parameters() if key not in in_backward}
    optimizer = KeyedOptimizerWrapper(rest, lambda params: torch.optim.SGD(params, lr=LR))
    whole = torch.optim.SGD(reference.parameters(), lr=LR)
    own, expected = [], []
    for step in range(STEPS):
        for cleared in (optimizer, whole):
            cleared.zero_grad()
        loss = loss_of(sharded, reference, batch_of(step, rank, world_size))
        loss.backward()
        optimizer.step()
        own.append(float(loss.detach()))
        loss = loss_of(reference, reference, batch_of(step, 0, 1))
        loss.backward()
        whole.step()
        expected.append(float(loss.detach()))
    trained, start = weights_of(sharded), compressed(name, operation).state_dict()
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(trained[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
        if "embedding" in key and not key.endswith("fingerprint"):
            assert not torch.equal(value, start[key]), key
    return own, expected


CASES = [*((name, "mult") for name in MODELS), ("DLRM", "add"), ("NextItem", "concat")]


QUICK = [("DLRM", "mult"), ("NextItem", "mult")]


@pytest.fixture(scope="module")
def found_losses(selected: set[Any]) -> Any:
    cases = [case for case in CASES if case in selected]
    return dict(zip(cases, zip(*run_ranks(losses, 2, cases), strict=True), strict=True))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow, id=" ".join(case)) for case in CASES]
)
def test_sharded_losses_are_those_of_the_unsharded_model(case: tuple[str, str], found_losses: Any) -> None:
    (first, expected), (second, same) = found_losses[case]
    assert expected == same
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(expected, rel=1e-5)


def fitted_values(rank: int, world_size: int) -> None:
    """Checks that a fitted model on the CPU is sharded with its values, those of plain tables too."""
    torch.manual_seed(0)
    model = dlrm(bags(*SIZES))
    compress_(model, QuotientRemainder(num_collisions=5), min_rows=30, fit=True)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    sharders = sharders_of({"optimizer": SGD, "learning_rate": LR})
    (found,) = collections_in(model)
    plan = ShardingPlan({found.path: plan_for(found, sharders[0])})
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    for key, value in weights_of(sharded).items():
        assert torch.equal(value, expected[key]), key


def test_a_fitted_model_is_sharded_with_its_values() -> None:
    run_ranks(fitted_values, 2)
