"""Quantised collections return floats within the error of the rows' scales, and what TorchRec's return."""

from typing import Any

import oracle
import pytest
import torch
from kinds import kind_of
from quantised_tables import (
    DTYPES,
    SERVED,
    S,
    embedding_errors,
    features_of,
    float_collection,
    qconfig,
    row_errors,
    tables,
    values_of,
)
from single_tables import collection_of, plain_table
from small_collections import OPERATIONS, pooled_or_not
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType
from torchrec.quant.embedding_modules import EmbeddingBagCollection as TheirBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as TheirCollection

from torchrec_qr import CompositionalEmbeddingCollection, MixedRadix
from torchrec_qr.inference import quantize_embeddings
from torchrec_qr.quant import QuantCompositionalEmbeddingBagCollection, QuantCompositionalEmbeddingCollection
from torchrec_qr.quant.quantised_table import QuantisedTable
from torchrec_qr.quant.row_storage import read_stored

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "int4"])


def dequantised(module: Any, quantised: Any) -> Any:
    """Writes the values of the stored rows into the float collection, and returns it."""
    pooled = hasattr(module, "embedding_bags")
    own, stored = (getattr(m, "embedding_bags" if pooled else "embeddings") for m in (module, quantised))
    for name, table in stored.items():
        for parameter, rows, width in zip(own[name].weights(), table.weights(), table.layout.widths, strict=True):
            parameter.data.copy_(read_stored(rows, width, table.config.data_type))
    return module


def rows_of(config: Any, ids: Tensor) -> list[Tensor]:
    if not hasattr(config, "partitions"):
        return [ids]
    if config.id_hash is not None:
        hashed = oracle.hashed(lambda x: (x,), config.num_embeddings, config.hash_seed)
        ids = torch.tensor([hashed(x)[0] for x in ids.tolist()])
    return list(config.bound_partitions.rows(ids).T)


@each_dtype
@pytest.mark.parametrize("name", SERVED)
def test_an_embedding_differs_as_the_scales_of_its_rows_allow(name: str, dtype: torch.dtype) -> None:
    module = float_collection(False, kinds={name: SERVED[name]})
    quantised = quantize_embeddings(module, dtype)
    ids = torch.arange(S)
    features = KeyedJaggedTensor(keys=[f"f_{name}"], values=ids, lengths=torch.tensor([S]))
    (config,), table = module.embedding_configs(), quantised.embeddings[name]
    actual, expected = (m(features)[f"f_{name}"].values().double() for m in (quantised, module))
    weights = [w.detach() for w in module.embeddings[name].weights()]
    allowed = embedding_errors(config, rows_of(config, ids), weights, table.weights())
    error = (actual - expected).abs()
    assert (error <= allowed * (1 + 1e-5) + 1e-6).all()
    assert error.max() > 0.1 * allowed.max()  # a bound that says something
    assert table.weights()[0].dtype == torch.uint8


@each_dtype
@pytest.mark.parametrize("is_weighted", [False, True])
def test_bags_differ_as_the_scales_of_their_rows_allow(is_weighted: bool, dtype: torch.dtype) -> None:
    module = float_collection(True, is_weighted)
    quantised = quantize_embeddings(module, dtype)
    features = features_of(module)
    actual, expected = quantised(features).to_dict(), module(features).to_dict()
    for config in module.embedding_bag_configs():
        for feature in config.feature_names:
            of_feature = features[feature]
            ids, lengths = of_feature.values(), of_feature.lengths()
            of_ids = embedding_errors(
                config,
                rows_of(config, ids),
                [w.detach() for w in module.embedding_bags[config.name].weights()],
                quantised.embedding_bags[config.name].weights(),
            )
            if is_weighted:
                of_ids *= of_feature.weights().abs().unsqueeze(1)
            bags = torch.arange(len(lengths)).repeat_interleave(lengths)
            allowed = torch.zeros(len(lengths), config.embedding_dim, dtype=torch.float64).index_add_(0, bags, of_ids)
            if config.pooling.name == "MEAN":
                allowed /= lengths.clamp(min=1).unsqueeze(1)
            name = feature if feature in actual else f"{feature}@{config.name}"
            error = (actual[name] - expected[name]).double().abs()
            assert (error <= allowed * (1 + 1e-5) + 1e-5).all(), name
            assert error.max() > 0


@each_dtype
@pooled_or_not
def test_it_equals_the_collection_of_dequantised_rows(pooled: bool, dtype: torch.dtype) -> None:
    for is_weighted in (False, True) if pooled else (False,):
        module = float_collection(pooled, is_weighted)
        quantised = quantize_embeddings(module, dtype)
        features = features_of(module)
        floats = dequantised(module, quantised)
        in_one_kernel = quantize_embeddings(floats, torch.float32)(features)
        assert torch.equal(values_of(quantised(features)), values_of(in_one_kernel))
        torch.testing.assert_close(values_of(quantised(features)), values_of(floats(features)), rtol=1e-6, atol=1e-6)


@each_dtype
@pooled_or_not
def test_plain_tables_equal_torchrecs_quantised_collection(pooled: bool, dtype: torch.dtype) -> None:
    """FBGEMM sums in another order, and fuses multiplication and addition."""
    plain = {f"t{i}": (None, {}) for i in range(4)}
    configs = tables(pooled, kinds=plain)
    ours = collection_of(configs)
    theirs: Any = (EmbeddingBagCollection if pooled else EmbeddingCollection)(tables=configs)
    theirs.load_state_dict(ours.state_dict())
    ours.qconfig = theirs.qconfig = qconfig(dtype)
    own_class = QuantCompositionalEmbeddingBagCollection if pooled else QuantCompositionalEmbeddingCollection
    quantised, peer = own_class.from_float(ours), (TheirBagCollection if pooled else TheirCollection).from_float(theirs)
    features = features_of(ours)
    actual, expected = quantised(features), peer(features)
    if not pooled:
        assert actual.keys() == expected.keys()
        for name, jagged in actual.items():
            assert torch.equal(jagged.lengths(), expected[name].lengths())
            torch.testing.assert_close(jagged.values(), expected[name].values(), rtol=1e-6, atol=1e-7)
        return
    for name, values in expected.to_dict().items():  # TorchRec groups tables by their pooling
        torch.testing.assert_close(actual[name], values, rtol=1e-6, atol=1e-7)


IN_PYTORCH = {
    "path": (kind_of("strided", 2).partitions, OPERATIONS["path"]),
    "path_hidden": (kind_of("strided", 2).partitions, OPERATIONS["path_hidden"]),
    "path_explicit": (kind_of("explicit", 3).partitions, OPERATIONS["path"]),
    "path_hashed": (kind_of("strided", 2).partitions, {**OPERATIONS["path"], "id_hash": "splitmix64"}),
    "five_mult": (MixedRadix(sizes=[3, 3, 3, 2, 2]), OPERATIONS["mult"]),
    "five_concat": (MixedRadix(sizes=[3, 3, 3, 2, 2]), OPERATIONS["concat"]),
}


@each_dtype
@pooled_or_not
def test_pytorch_looks_up_what_the_operators_do_not_have(pooled: bool, dtype: torch.dtype) -> None:
    kinds = {"plain": SERVED["plain"], **IN_PYTORCH, "hash": SERVED["hash"]}
    module = float_collection(pooled, pooled, kinds=kinds, dim=20)
    quantised = quantize_embeddings(module, dtype)
    tables_of = quantised.embedding_bags if pooled else quantised.embeddings
    assert [t.config.name for t in tables_of.values() if not t.is_served] == list(IN_PYTORCH)
    features = features_of(module)
    floats = dequantised(module, quantised)
    torch.testing.assert_close(values_of(quantised(features)), values_of(floats(features)), rtol=1e-5, atol=1e-5)
    empty = KeyedJaggedTensor(
        keys=features.keys(),
        values=torch.empty(0, dtype=torch.int64),
        lengths=torch.zeros(2 * len(features.keys()), dtype=torch.int64),
        weights=torch.empty(0),
    )
    assert torch.equal(values_of(quantised(empty)), values_of(floats(empty)))
    with pytest.raises(NotImplementedError, match=r"table 'path': operation 'path' with 2 partitions is looked up in"):
        torch.fx.symbolic_trace(quantised)


@pytest.mark.parametrize("policy", ["clamp", "wrap", "error", "unchecked"])
@pytest.mark.parametrize("name", ["strided_mult", "explicit_mult", "path"])
@pooled_or_not
def test_ids_outside_follow_the_policy_of_their_table(pooled: bool, name: str, policy: str) -> None:
    partitions, fields = {**SERVED, **IN_PYTORCH}[name]
    module = float_collection(pooled, kinds={name: (partitions, {**fields, "out_of_range": policy})})
    quantised = quantize_embeddings(module, torch.qint8)
    outside = {"error": [5, S], "unchecked": [5, 7]}.get(policy, [5, -1, S, 3 * S])
    features = KeyedJaggedTensor(
        keys=[f"f_{name}"], values=torch.tensor(outside), lengths=torch.tensor([1, len(outside) - 1])
    )
    if policy == "error":
        with pytest.raises(IndexError, match=rf"table '{name}', feature 'f_{name}': id 100 is outside \[0, 100\)"):
            quantised(features)
        return
    floats = dequantised(module, quantised)
    torch.testing.assert_close(values_of(quantised(features)), values_of(floats(features)), rtol=1e-5, atol=1e-5)


def test_need_indices_returns_the_ids_of_the_float_collection() -> None:
    kinds = {**SERVED, "path": IN_PYTORCH["path"]}
    for of_kinds in (SERVED, kinds):
        module = CompositionalEmbeddingCollection(tables=tables(False, kinds=of_kinds), need_indices=True)
        features = features_of(module)
        for dtype in (torch.float32, torch.float16):
            quantised = quantize_embeddings(module, torch.qint8, output_dtype=dtype)
            actual, expected = quantised(features), module(features)
            assert list(actual) == list(expected)
            assert all(torch.equal(actual[name].weights(), expected[name].weights()) for name in expected)
            assert all(torch.equal(actual[name].lengths(), expected[name].lengths()) for name in expected)


@pytest.mark.parametrize("output", [torch.float16, torch.bfloat16])
@pooled_or_not
def test_the_output_is_rounded_to_its_type(pooled: bool, output: torch.dtype) -> None:
    module = float_collection(pooled)
    features = features_of(module)
    rounded = quantize_embeddings(module, torch.qint8, output_dtype=output)
    assert rounded.output_dtype() == output
    expected = values_of(quantize_embeddings(module, torch.qint8)(features)).to(output)
    assert torch.equal(values_of(rounded(features)), expected)


def test_tables_have_types_of_their_own() -> None:
    module = float_collection(True)
    quantised = quantize_embeddings(
        module, torch.qint8, per_table_weight_dtype={"hash": torch.quint4x2, "plain": torch.float16}
    )
    types = {name: table.row_type for name, table in quantised.embedding_bags.items()}
    assert types == dict.fromkeys(SERVED, "int8") | {"hash": "int4", "plain": "fp16"}
    floats = dequantised(module, quantised)
    features = features_of(module)
    torch.testing.assert_close(values_of(quantised(features)), values_of(floats(features)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("data_type", ["FP16", "BF16"])
def test_float_tables_of_half_precision_are_quantised(data_type: str) -> None:
    partitions, fields = SERVED["strided_mult"]
    module = float_collection(True, kinds={"t": (partitions, {**fields, "data_type": DataType[data_type]})})
    quantised = quantize_embeddings(module, torch.qint8)
    features = features_of(module)
    table: QuantisedTable = quantised.embedding_bags["t"]
    fp32 = [w.detach().float() for w in module.embedding_bags["t"].weights()]
    for own, rows in zip(fp32, table.weights(), strict=True):
        assert torch.equal(rows, torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(own, 8))
    torch.testing.assert_close(values_of(quantised(features)), values_of(module(features)), rtol=0.05, atol=0.05)


@each_dtype
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 6])
def test_rows_of_any_width_are_stored_and_served(dim: int, dtype: torch.dtype) -> None:
    """FBGEMM writes rows of whole pairs of bytes. Values far from 0 show a range that something else widens."""
    module = collection_of([plain_table(embedding_dim=dim, num_embeddings=S)])
    weight = torch.rand(S, dim, generator=torch.Generator().manual_seed(0)) + 5
    module.embedding_bags["t"].weight.data.copy_(weight)
    ones = KeyedJaggedTensor(keys=["f"], values=torch.arange(S), lengths=torch.ones(S, dtype=torch.int64))
    quantised = quantize_embeddings(module, dtype)
    (stored,) = quantised.embedding_bags["t"].weights()
    assert stored.shape == (S, -(-dim * (8 if dtype == torch.qint8 else 4) // 8) + 4)
    assert quantised.embedding_bags["t"].is_served
    actual = quantised(ones)
    errors = row_errors(weight, stored)
    assert ((actual["f"] - weight).double().abs() <= errors * (1 + 1e-5) + 1e-6).all()
    floats = dequantised(module, quantised)
    assert torch.equal(actual["f"], floats(ones)["f"])
