"""The lookup of all tables of a collection at once gives what a collection of each table by itself gives."""

from typing import Any

import pytest
import torch
from batches import Bags, batch
from cases import kind_of, randomize
from single_tables import bag_table, sequence_table
from torch import Tensor
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingCollection

MEAN = PoolingType.MEAN


def bag_tables() -> list[EmbeddingBagConfig]:
    """Tables with kernels, one of PyTorch's between, and a plain one: of several D, poolings and types."""
    strided, explicit, radix = (kind_of(*of).partitions for of in (("strided", 2), ("explicit", 2), ("mixed_radix", 3)))
    return [
        bag_table(strided, name="a", feature_names=["f0", "f1"]),
        bag_table(explicit, name="b", feature_names=["f2"], pooling=MEAN, out_of_range="clamp"),
        EmbeddingBagConfig(name="p", feature_names=["f3"], num_embeddings=100, embedding_dim=12, pooling=MEAN),
        bag_table(radix, name="c", feature_names=["f4"], pooling=MEAN, data_type=DataType.FP16),
        bag_table(strided, name="d", feature_names=["f5"], operation="path"),
        bag_table(strided, name="e", feature_names=["f6"], embedding_dim=16, operation="concat", out_of_range="wrap"),
    ]


def sequence_tables() -> list[EmbeddingConfig]:
    strided, explicit = kind_of("strided", 2).partitions, kind_of("explicit", 2).partitions
    return [
        sequence_table(strided, name="a", feature_names=["f0", "f1"]),
        sequence_table(explicit, name="b", feature_names=["f2"], embedding_dim=4, out_of_range="clamp"),
        EmbeddingConfig(name="p", feature_names=["f3"], num_embeddings=100, embedding_dim=12),
        sequence_table(strided, name="c", feature_names=["f4"], operation="add", data_type=DataType.FP16),
    ]


def bags_of(features: int, num_bags: int = 9) -> dict[str, Bags]:
    generator = torch.Generator().manual_seed(3)
    of: dict[str, Bags] = {}
    for f in range(features):
        lengths = torch.randint(4, (num_bags,), generator=generator).tolist()
        of[f"f{f}"] = [torch.randint(100, (n,), generator=generator).tolist() for n in lengths]
    return of


def factors(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel()).view(out.shape)


def bags(tables: list[Any], weighted: bool = False) -> CompositionalEmbeddingBagCollection:
    torch.manual_seed(0)
    module = CompositionalEmbeddingBagCollection(tables=tables, is_weighted=weighted)
    randomize(module, 0)
    return module


def sequences() -> CompositionalEmbeddingCollection:
    torch.manual_seed(0)
    module = CompositionalEmbeddingCollection(tables=sequence_tables())
    randomize(module, 0)
    return module


def weights_of(of: dict[str, Bags]) -> Tensor:
    n = sum(len(bag) for feature in of.values() for bag in feature)
    return torch.linspace(0.5, 2, n)


@pytest.mark.parametrize("order", ["in order", "reversed", "with others"])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_tables_together_are_each_by_itself(weighted: bool, order: str) -> None:
    """Bit for bit, with the gradients of tables and of the weights of ids."""
    of = bags_of(7)
    if order == "reversed":
        of = dict(reversed(of.items()))
    elif order == "with others":
        of = {"other": [[10**9]] * 9, **of}
    weights = weights_of(of).requires_grad_() if weighted else None
    alone_weights = weights_of(of).requires_grad_() if weighted else None
    module = bags(bag_tables(), weighted)
    out = module(batch(of, weights))
    (out.values() * factors(out.values())).sum().backward()

    first = 0
    for config in bag_tables():
        alone = bags([config], weighted)
        state = {k: v for k, v in module.state_dict().items() if k.split(".")[1] == config.name}
        alone.load_state_dict(state)
        own = alone(batch(of, alone_weights))
        columns = slice(first, first + own.values().shape[1])
        first = columns.stop
        assert torch.equal(out.values()[:, columns], own.values()), config.name
        (own.values() * factors(out.values())[:, columns]).sum().backward()
        together = dict(module.named_parameters())
        for name, parameter in alone.named_parameters():
            assert torch.equal(together[name].grad, parameter.grad), name
    assert first == out.values().shape[1]
    if weights is not None and alone_weights is not None:
        torch.testing.assert_close(weights.grad, alone_weights.grad, rtol=0, atol=0)


def test_sequences_together_are_each_by_itself() -> None:
    of, module = bags_of(5), sequences()
    out = module(batch(of))
    torch.stack([(v.values() * factors(v.values())).sum() for v in out.values()]).sum().backward()
    for config in sequence_tables():
        alone = CompositionalEmbeddingCollection(tables=[config])
        alone.load_state_dict({k: v for k, v in module.state_dict().items() if k.split(".")[1] == config.name})
        own = alone(batch(of))
        for feature, jagged in own.items():
            assert torch.equal(out[feature].values(), jagged.values()), feature
            assert out[feature].lengths().tolist() == [len(bag) for bag in of[feature]]
        torch.stack([(v.values() * factors(v.values())).sum() for v in own.values()]).sum().backward()
        together = dict(module.named_parameters())
        for name, parameter in alone.named_parameters():
            assert torch.equal(together[name].grad, parameter.grad), name


def gradients(module: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


def test_a_sequence_without_a_gradient_leaves_its_table_without_one() -> None:
    """An optimizer with momentum or decay would step on zeros."""
    of, module = bags_of(5), sequences()
    out = module(batch(of))
    out["f1"].values().sum().backward()
    found = gradients(module)
    assert [name for name, g in found.items() if g is not None] == [
        *("embeddings.a.partition_0.weight", "embeddings.a.partition_1.weight")
    ]
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(module(batch(of))["f1"].values().sum(), [module.embeddings["b"].partition_0.weight])


def test_sequences_have_backwards_of_their_own() -> None:
    of, at_once, one_by_one = bags_of(5), sequences(), sequences()
    torch.stack([v.values().square().sum() for v in at_once(batch(of)).values()]).sum().backward()
    for jagged in one_by_one(batch(of)).values():
        jagged.values().square().sum().backward()
    for (name, expected), actual in zip(gradients(at_once).items(), gradients(one_by_one).values(), strict=True):
        # The features of table a are summed by autograd where each has a backward, and by the lookup otherwise.
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, msg=name)


def test_a_sequence_may_change_in_place() -> None:
    of, module, expected = bags_of(5), sequences(), sequences()
    out = module(batch(of))
    out["f0"].values().mul_(2)
    untouched = out["f2"].values().detach().clone()
    (out["f0"].values().sum() + out["f2"].values().sum()).backward()
    results = expected(batch(of))
    (2 * results["f0"].values().sum() + results["f2"].values().sum()).backward()
    assert torch.equal(untouched, results["f2"].values())
    for (name, wanted), actual in zip(gradients(expected).items(), gradients(module).values(), strict=True):
        torch.testing.assert_close(actual, wanted, msg=name)


def test_a_table_that_changes_before_the_backward_of_a_sequence_is_an_error() -> None:
    of, module = bags_of(5), sequences()
    out = module(batch(of))["f0"].values().sum()
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(RuntimeError, match=r"tables \['a', 'b', 'c'\] was changed in place"):
        out.backward()


@pytest.mark.parametrize("pooled", [True, False])
def test_frozen_partitions_have_no_gradient_and_the_others_what_they_had(pooled: bool) -> None:
    def trained(frozen: str | None) -> dict[str, Tensor | None]:
        of = bags_of(7)
        module: Any = bags(bag_tables()) if pooled else sequences()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen is None or frozen not in name)
        out = module(batch(of))
        values = [out.values()] if pooled else [v.values() for v in out.values()]
        torch.stack([(v * factors(v)).sum() for v in values]).sum().backward()
        return gradients(module)

    for_all, for_some = trained(None), trained(".a.partition_1")
    for name, gradient in for_all.items():
        if ".a.partition_1" in name:
            assert for_some[name] is None
        else:
            assert torch.equal(gradient, for_some[name]), name


def test_tables_that_are_brought_to_life_one_by_one_are_looked_up() -> None:
    """``DistributedModelParallel`` does so. A class map is made anew on the device of its table."""
    of, expected = bags_of(7), bags(bag_tables())
    module = CompositionalEmbeddingBagCollection(tables=bag_tables(), device=torch.device("meta"))
    for table in module.embedding_bags.values():
        table.to_empty(device="cpu")
    module.load_state_dict(expected.state_dict())
    assert torch.equal(module(batch(of)).values(), expected(batch(of)).values())


def test_features_of_different_numbers_of_bags_need_inverse_indices() -> None:
    module = bags([bag_table(kind_of("strided", 2).partitions, feature_names=["f", "g"])])
    kjt = KeyedJaggedTensor(
        keys=["f", "g"],
        values=torch.tensor([1, 2, 3]),
        lengths=torch.tensor([2, 0, 1]),
        stride_per_key_per_rank=[[1], [2]],
    )
    with pytest.raises(ValueError, match=r"features \['f', 'g'\]: \[1, 2\] bags and no inverse indices"):
        module(kjt)
