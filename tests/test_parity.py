"""Collections against the float64 oracle: outputs and every gradient."""

from contextlib import nullcontext
from typing import Any

import oracle
import pytest
import torch
from batches import Bags, batch
from cases import Kind, configs, kind_of, oracle_of, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_reference import gradient_of
from roundings import Allowances, allowances, assert_agrees
from single_tables import bag_table, sequence_table
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, PoolingType

from benchmarks.quality.feature_generation import FeatureGenerationEmbeddingBagCollection
from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingCollection,
)
from torchrec_qr.modules.table import CompositionalTable
from torchrec_qr.ops.cpu_library import without_kernels

BAGS = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=4)


def given_bags(kind: Kind, bags: Bags, int32: bool = False) -> Bags:
    """Spreads the ids of a table that hashes them over all that the type has."""
    if kind.hash_seed is None:
        return bags
    step = 2**25 + 1 if int32 else 2**57 + 1
    return [[(x - 50) * step for x in bag] for bag in bags]


def per_bag(flat: torch.Tensor, bags: Bags) -> list[torch.Tensor]:
    return list(flat.split([len(bag) for bag in bags]))


def assert_gradients_agree(module: CompositionalTable, table: oracle.OracleTable, allowed: Allowances) -> None:
    for j, (w, exact) in enumerate(zip(module.weights(), table.weights, strict=True)):
        assert_agrees(w.grad, gradient_of(exact), f"gradient of partition {j}", allowed.partitions[j])


@settings(max_examples=300, deadline=None)
@given(case=configs(may_hash=True), bags=BAGS, weighted=st.booleans(), int32=st.booleans(), seed=st.integers(0, 1000))
def test_pooled_table_agrees_with_oracle(
    case: tuple[Any, Kind], bags: Bags, weighted: bool, int32: bool, seed: int
) -> None:
    config, kind = case
    bags = given_bags(kind, bags, int32)
    ebc = CompositionalEmbeddingBagCollection(tables=[config], is_weighted=weighted)
    randomize(ebc, seed)
    n = sum(len(bag) for bag in bags)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.empty(n).uniform_(0.5, 2, generator=generator).requires_grad_() if weighted else None
    kjt = batch({"f_t": bags}, weights)
    if int32:
        kjt = KeyedJaggedTensor(["f_t"], kjt.values().int(), weights=weights, lengths=kjt.lengths())
    out = ebc(kjt)["f_t"]

    table = oracle_of(config, kind, ebc.embedding_bags["t"])
    exact_weights = weights.detach().double().requires_grad_() if weights is not None else None
    expected = table.pool(bags, None if exact_weights is None else per_bag(exact_weights, bags))
    assert out.dtype == torch.float32
    grad = torch.empty(out.shape).uniform_(0.5, 2, generator=generator)
    allowed = allowances(config, kind, ebc.embedding_bags["t"], bags, weights, grad)
    assert_agrees(out, expected.detach(), "output", allowed.output)
    out.backward(grad)
    if expected.requires_grad:
        expected.backward(grad.double())
    assert_gradients_agree(ebc.embedding_bags["t"], table, allowed)
    if weights is not None and exact_weights is not None and n:
        assert_agrees(weights.grad, exact_weights.grad, "gradient of the input weights", allowed.weights)


@settings(max_examples=150, deadline=None)
@given(case=configs(pooled=False, may_hash=True), bags=BAGS, seed=st.integers(0, 1000))
def test_sequence_table_agrees_with_oracle(case: tuple[Any, Kind], bags: Bags, seed: int) -> None:
    config, kind = case
    bags = given_bags(kind, bags)
    ec = CompositionalEmbeddingCollection(tables=[config], need_indices=True)
    randomize(ec, seed)
    out = ec(batch({"f_t": bags}))["f_t"]
    flat = [x for bag in bags for x in bag]
    assert out.lengths().tolist() == [len(bag) for bag in bags]
    assert out.weights().tolist() == flat
    assert out.values().dtype == torch.float32
    table = oracle_of(config, kind, ec.embeddings["t"])
    expected = torch.stack([table.embed(x) for x in flat]) if flat else torch.zeros(0, config.embedding_dim).double()
    grad = torch.empty(expected.shape).uniform_(0.5, 2, generator=torch.Generator().manual_seed(seed))
    allowed = allowances(config, kind, ec.embeddings["t"], [[x] for x in flat], None, grad, pooled=False)
    assert_agrees(out.values(), expected.detach(), "output", allowed.output)
    out.values().backward(grad)
    if flat:
        expected.backward(grad.double())
    assert_gradients_agree(ec.embeddings["t"], table, allowed)


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
@pytest.mark.parametrize("operation", ["mult", "add", "concat", "path"])
@pytest.mark.parametrize("kernels", [True, False])
def test_what_roundings_are_allowed_tells_right_from_wrong(kernels: bool, operation: str, data_type: DataType) -> None:
    """Wrong are: another row of one partition for one id, an id left out, MEAN by one id too many."""
    kind = kind_of("mixed_radix", 3)
    config = bag_table(
        kind.partitions,
        embedding_dim=12,
        feature_names=["f_t"],
        data_type=data_type,
        operation=operation,
        pooling=PoolingType.MEAN,
    )
    ebc = CompositionalEmbeddingBagCollection(tables=[config], is_weighted=True)
    randomize(ebc, 0)
    bags = [[5, 99, 5, 17, 40], [40, 7, 88, 17, 5], [], [63, 62, 61, 60, 5], [40]]
    weights = torch.linspace(0.5, 2, 16).requires_grad_()
    with nullcontext() if kernels else without_kernels():
        out = ebc(batch({"f_t": bags}, weights))["f_t"]
        grad = torch.linspace(0.5, 2, out.numel()).view(out.shape)
        out.backward(grad)
        module = ebc.embedding_bags["t"]
        allowed = allowances(config, kind, module, bags, weights, grad)

    def agree(rows_of: oracle.RowsOf, factors: torch.Tensor) -> list[bool]:
        """Compares output and gradients of partitions and weights with those of another choice of rows and weights."""
        table = oracle_of(config, Kind("", kind.partitions, kind.num_embeddings, rows_of), module)
        exact = (weights.detach() * factors).double().requires_grad_()
        expected = table.pool(bags, per_bag(exact, bags))
        expected.backward(grad.double())
        of_partitions = zip(module.weights(), table.weights, allowed.partitions, strict=True)
        checks = [(out, expected.detach(), allowed.output), *((w.grad, e.grad, a) for w, e, a in of_partitions)]
        return [agrees(*check) for check in [*checks, (weights.grad, exact.grad, allowed.weights)]]

    ones = torch.ones(16)
    assert agree(kind.rows_of, ones) == [True] * 5
    for j in range(3):

        def other_row(x: int, j: int = j) -> tuple[int, ...]:
            rows = list(kind.rows_of(x))
            if x == 17:
                rows[j] = (rows[j] + 1) % kind.bound.sizes[j]
            return tuple(rows)

        of_output, *of_partitions, of_weights = agree(other_row, ones)
        assert not of_output
        assert not of_partitions[j]
        assert not of_weights
    missing = ones.clone()
    missing[3] = 0
    of_output, *of_partitions, _ = agree(kind.rows_of, missing)
    assert not of_output
    assert not any(of_partitions)
    one_more = torch.cat([torch.full((len(bag),), len(bag) / (len(bag) + 1)) for bag in bags])
    of_output, *of_partitions, _ = agree(kind.rows_of, one_more)
    assert not of_output
    assert not any(of_partitions)


def agrees(actual: torch.Tensor, expected: torch.Tensor, allowance: torch.Tensor | float) -> bool:
    try:
        assert_agrees(actual, expected, "", allowance)
    except AssertionError:
        return False
    return True


def mixed_tables() -> tuple[list[EmbeddingBagConfig], dict[str, Kind]]:
    """Plain and compositional tables in order, of different D; f0 is in two tables, t_qr has two features."""
    qr, crt = kind_of("strided", 2), kind_of("chinese_remainder", 3)
    return [
        EmbeddingBagConfig(name="plain", num_embeddings=100, embedding_dim=6, feature_names=["f0", "f1"]),
        bag_table(qr.partitions, name="t_qr", feature_names=["f2", "f0"]),
        EmbeddingBagConfig(
            name="plain_mean", num_embeddings=100, embedding_dim=4, feature_names=["f3"], pooling=PoolingType.MEAN
        ),
        bag_table(
            crt.partitions,
            name="t_crt",
            embedding_dim=16,
            feature_names=["f1"],
            operation="concat",
            partition_dims=[8, 4, 4],
            pooling=PoolingType.MEAN,
        ),
    ], {"t_qr": qr, "t_crt": crt}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), weighted=st.booleans())
def test_mixed_collection_agrees_with_oracle(data: st.DataObject, weighted: bool) -> None:
    tables, kinds = mixed_tables()
    ebc = CompositionalEmbeddingBagCollection(tables=tables, is_weighted=weighted)
    randomize(ebc, 0)
    size = data.draw(st.integers(0, 4))
    bags = {
        f: [data.draw(st.lists(st.integers(0, 99), max_size=4)) for _ in range(size)] for f in ("f3", "f2", "f1", "f0")
    }
    flat = torch.rand(sum(len(b) for f in bags.values() for b in f)) + 0.5
    kjt = batch(bags, flat)  # unweighted collections ignore the weights
    out = ebc(kjt)
    assert out.keys() == ["f0@plain", "f1@plain", "f2", "f0@t_qr", "f3", "f1@t_crt"]
    assert out.length_per_key() == [6, 6, 8, 8, 4, 16]
    by_feature = dict(zip(bags, flat.double().split([sum(map(len, b)) for b in bags.values()]), strict=True))
    names = out.keys()
    for config in tables:
        module = ebc.embedding_bags[config.name]
        if config.name in kinds:
            table = oracle_of(config, kinds[config.name], module)
        else:
            pooling = "mean" if config.pooling == PoolingType.MEAN else "sum"
            table = oracle.OracleTable(lambda x: (x,), [module.weight.detach().double()], "add", pooling)
        for feature in config.feature_names:
            weights = per_bag(by_feature[feature], bags[feature]) if weighted else None
            name = feature if feature in names else f"{feature}@{config.name}"
            assert_agrees(out[name], table.pool(bags[feature], weights).detach(), name)


@settings(max_examples=30, deadline=None)
@given(bags=BAGS)
def test_feature_generation_keeps_partitions_apart(bags: Bags) -> None:
    tables, kinds = mixed_tables()
    tables[3] = bag_table(kinds["t_crt"].partitions, name="t_crt", feature_names=["f1"], pooling=PoolingType.MEAN)
    ebc = FeatureGenerationEmbeddingBagCollection(tables=tables)
    out = ebc(batch({f"f{i}": bags for i in range(4)}))
    assert out.keys() == [
        *("f0@plain", "f1@plain", "f2.partition_0", "f2.partition_1", "f0@t_qr.partition_0", "f0@t_qr.partition_1"),
        *("f3", "f1@t_crt.partition_0", "f1@t_crt.partition_1", "f1@t_crt.partition_2"),
    ]
    for name, feature, pooling in (("t_qr", "f2", "sum"), ("t_crt", "f1@t_crt", "mean")):
        for j, w in enumerate(ebc.embedding_bags[name].weights()):
            rows_of = kinds[name].rows_of
            table = oracle.OracleTable(
                lambda x, j=j, rows_of=rows_of: (rows_of(x)[j],), [w.detach().double()], "add", pooling
            )
            assert_agrees(out[f"{feature}.partition_{j}"], table.pool(bags).detach(), name)


def test_sequences_of_mixed_tables_of_different_dims() -> None:
    qr = kind_of("adjacent", 2)
    ec = CompositionalEmbeddingCollection(
        tables=[
            EmbeddingConfig(name="plain", num_embeddings=100, embedding_dim=4, feature_names=["f0"]),
            sequence_table(qr.partitions, feature_names=["f1", "f0"]),
        ]
    )
    randomize(ec, 3)
    out = ec(batch({"f0": [[5, 99], []], "f1": [[1], [0, 1]]}))
    assert list(out) == ["f0@plain", "f1", "f0@t"]
    assert torch.equal(out["f0@plain"].values(), ec.embeddings["plain"].weight[[5, 99]])
    w0, w1 = ec.embeddings["t"].weights()
    assert torch.equal(out["f0@t"].values(), w0[[0, 14]] * w1[[5, 1]])
    assert torch.equal(out["f1"].values(), w0[[0, 0, 0]] * w1[[1, 0, 1]])
    assert out["f1"].lengths().tolist() == [1, 2]
