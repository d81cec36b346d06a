"""Full rows of tables: those of the oracle, and bit for bit those of a forward."""

from typing import Any

import pytest
import torch
from batches import batch
from cases import configs, oracle_of, randomize
from hypothesis import given
from kinds import Kind, kind_of
from single_tables import bag_table, collection_of, plain_table, sequence_table, table_of
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor
from torchrec.modules.embedding_configs import DataType

from torchrec_qr import MixedRadix, QuotientRemainder
from torchrec_qr.inference import materialize, materialized_blocks


def forward_of(collection: Any, feature: str, ids: list[int]) -> Tensor:
    """(N, D): one id a bag."""
    out = collection(batch({feature: [[x] for x in ids]}))[feature]
    return (out if isinstance(out, Tensor) else out.values()).detach()


def assert_same(actual: Tensor, expected: Tensor, config: Any) -> None:
    """Bit for bit, except that the products of a path's matrices round by the number of ids."""
    roundings = {"rtol": 1e-5, "atol": 1e-5} if config.operation == "path" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(actual, expected, **roundings)


def check(config: Any, kind: Kind) -> None:
    collection = collection_of([config])
    randomize(collection, seed=1)
    full = materialize(collection, "t")
    (tables,) = (getattr(collection, name) for name in ("embedding_bags", "embeddings") if hasattr(collection, name))
    oracle = oracle_of(config, kind, tables["t"])
    expected = torch.stack([oracle.embed(x) for x in range(config.num_embeddings)]).detach()
    torch.testing.assert_close(full.double(), expected, rtol=1e-5, atol=1e-5)
    assert full.dtype == torch.float32
    assert not full.requires_grad
    ids = [99, 0, 7, 7, 50]
    for given_ids in (ids, torch.tensor(ids), torch.tensor(ids, dtype=torch.int32)):
        assert_same(materialize(collection, "t", given_ids), full[ids], config)
    blocks = list(materialized_blocks(collection, "t", num_rows=30))
    assert [len(block) for block in blocks] == [30, 30, 30, 10]
    assert_same(torch.cat(blocks), full, config)
    assert_same(forward_of(collection, "f_t", ids), full[ids], config)


@given(configs())
def test_full_rows_of_a_pooled_table(case: tuple[Any, Kind]) -> None:
    check(*case)


@given(configs(pooled=False))
def test_full_rows_of_a_table_without_pooling(case: tuple[Any, Kind]) -> None:
    check(*case)


@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16, DataType.BF16])
@pytest.mark.parametrize("pooled", [True, False])
def test_full_rows_of_a_plain_table_are_its_own_in_fp32(pooled: bool, data_type: DataType) -> None:
    tables = [table_of(QuotientRemainder(num_collisions=4), pooled), plain_table(pooled, name="p", data_type=data_type)]
    collection = collection_of(tables)
    randomize(collection, seed=1)
    weight = (collection.embedding_bags if pooled else collection.embeddings)["p"].weight
    assert torch.equal(materialize(collection, "p"), weight.detach().float())
    assert torch.equal(materialize(collection, "p", [3, 99]), weight.detach().float()[[3, 99]])


def test_a_table_of_2_to_the_40_ids_is_read_in_blocks() -> None:
    """Its full rows would take 16 TiB."""
    spec = QuotientRemainder(balanced=True)
    config = sequence_table(spec, num_embeddings=2**40, embedding_dim=4, init_fn=torch.nn.init.normal_)
    collection = collection_of([config])
    first = next(materialized_blocks(collection, "t", num_rows=1000))
    main, other = (p.detach() for p in collection.parameters())
    assert torch.equal(first, main[:1000] * other[0])
    assert torch.equal(materialize(collection, "t", [2**40 - 1])[0], main[-1] * other[-1])


def test_more_ids_than_are_looked_up_at_once() -> None:
    """A path's MLPs of 64 columns have 4,160 scalars, so that 3,971 ids are looked up at once."""
    config = bag_table(MixedRadix(sizes=[70, 70]), num_embeddings=4900, embedding_dim=64, operation="path")
    collection = collection_of([config])
    ids = torch.randint(4900, (8000,))
    full = materialize(collection, "t")
    assert full.shape == (4900, 64)
    assert_same(materialize(collection, "t", ids), full[ids], config)
    assert_same(forward_of(collection, "f", ids.tolist()), full[ids], config)
    (block,) = materialized_blocks(collection, "t")
    assert_same(block, full, config)


def test_no_ids_have_no_rows() -> None:
    collection = collection_of([bag_table(QuotientRemainder(num_collisions=4))])
    for ids in ([], torch.tensor([], dtype=torch.int32)):
        assert materialize(collection, "t", ids).shape == (0, 8)


@pytest.mark.parametrize("out_of_range", ["error", "clamp", "wrap", "unchecked"])
def test_ids_that_are_none_are_refused_under_every_policy(out_of_range: Any) -> None:
    spec = QuotientRemainder(num_collisions=4)
    collection = collection_of([bag_table(spec, out_of_range=out_of_range), plain_table(name="p")])
    for ids in ([100], [0, -1], [2**63], [0, -(2**64)]):
        with pytest.raises(IndexError, match=rf"table 't': id {ids[-1]}; allowed: 0 to 99"):
            materialize(collection, "t", ids)
    with pytest.raises(TypeError, match=r"table 't': ids have dtype torch\.float32; allowed: int32, int64"):
        materialize(collection, "t", [0.5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"table 't': ids have dtype torch\.bool; allowed: int32, int64"):
        materialize(collection, "t", torch.ones(100, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"table 't': ids have shape \(2, 1\); allowed: \(N,\)"):
        materialize(collection, "t", torch.zeros(2, 1, dtype=torch.int64))


def test_any_ids_of_a_table_that_hashes_them_have_rows() -> None:
    kind = kind_of("mixed_radix", 2).hashed(7)
    config = bag_table(kind.partitions, id_hash="splitmix64", hash_seed=7)
    collection = collection_of([config])
    randomize(collection, seed=1)
    table = oracle_of(config, kind, collection.embedding_bags["t"])
    ids = [-(2**63), -1, 0, 99, 100, 2**63 - 1]
    expected = torch.stack([table.embed(x) for x in ids]).detach()
    torch.testing.assert_close(materialize(collection, "t", ids).double(), expected, rtol=1e-5, atol=1e-5)
    for call in (lambda: materialize(collection, "t"), lambda: materialized_blocks(collection, "t")):
        with pytest.raises(ValueError, match="table 't': all rows of a table with id_hash"):
            call()
    with pytest.raises(IndexError, match=rf"table 't': id {2**64 - 1}; allowed: -2\^63 to 2\^63 - 1, .* same bits"):
        materialize(collection, "t", [0, 2**64 - 1])


def test_a_table_that_is_not_there_is_refused_with_those_that_are() -> None:
    collection = collection_of([bag_table(QuotientRemainder(num_collisions=4)), plain_table(name="p")])
    for call in (materialize, materialized_blocks):
        with pytest.raises(ValueError, match=r"table 'f' is not in the collection; allowed: t, p"):
            call(collection, "f")
    with pytest.raises(ValueError, match=r"table 't': num_rows=0; allowed: 1 or more"):
        materialized_blocks(collection, "t", num_rows=0)


def test_collections_without_partitions_or_values_are_refused() -> None:
    config = EmbeddingBagConfig(name="t", feature_names=["f"], num_embeddings=10, embedding_dim=4)
    for other in (EmbeddingBagCollection(tables=[config]), KeyedTensor):
        with pytest.raises(TypeError, match=r"allowed: CompositionalEmbeddingBagCollection, CompositionalEmbeddingC"):
            materialize(other, "t")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is on the meta device, without values; allowed: a real device"):
        materialize(collection_of([bag_table(QuotientRemainder(num_collisions=4))], "meta"), "t")
