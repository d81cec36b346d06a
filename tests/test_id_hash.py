"""The hash of ids of an open vocabulary."""

import math
from typing import Any

import oracle
import pytest
import torch
from batches import batch
from cases import kind_of, oracle_of, randomize
from near import assert_near
from single_tables import bag_table, collection_of, plain_table, table_of
from small_collections import pooled_or_not
from torch import Tensor
from torch.func import functional_call

from torchrec_qr import ExplicitPartitions, QuotientRemainder
from torchrec_qr.id_hash import hashed_ids
from torchrec_qr.ops.cpu_library import without_kernels

ANY = [0, 1, -1, 99, 100, 2**31 - 1, -(2**31), 2**40, -(2**40) - 7, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0]
KIND = kind_of("strided", 2).hashed(seed=7)


def hashed_table(pooled: bool = True, **fields: Any) -> Any:
    return table_of(KIND.partitions, pooled, id_hash="splitmix64", hash_seed=7, **fields)


def test_the_hash_is_a_splitmix64_generator() -> None:
    """The generator of seed 0 has these outputs, of which the n-th is h(n · increment)."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    multiples = [n * 0x9E3779B97F4A7C15 % 2**64 for n in range(4)]
    ids = torch.tensor([x - 2**64 if x >= 2**63 else x for x in multiples])
    assert hashed_ids(ids, 0, 2**62).tolist() == [output // 2 % 2**62 for output in outputs]
    assert hashed_ids(torch.tensor([0]), 3, 2**62).tolist() == [outputs[3] // 2 % 2**62]


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
@pytest.mark.parametrize("num_ids", [1, 100, 2**40])
def test_the_hash_is_the_oracles(num_ids: int, seed: int) -> None:
    of = oracle.hashed(lambda x: (x,), num_ids, seed)
    assert hashed_ids(torch.tensor(ANY), seed, num_ids).tolist() == [of(x)[0] for x in ANY]
    small = [x for x in ANY if -(2**31) <= x < 2**31]
    assert hashed_ids(torch.tensor(small, dtype=torch.int32), seed, num_ids).tolist() == [of(x)[0] for x in small]


def values_of(out: Any, name: str = "f") -> Tensor:
    return out[name] if isinstance(out[name], Tensor) else out[name].values()


@pooled_or_not
@pytest.mark.parametrize("operation", ["mult", "path"])
def test_any_id_is_looked_up_beside_tables_that_do_not_hash(pooled: bool, operation: str) -> None:
    """Kernels, PyTorch and given parameters have one result and one gradient."""
    tables = [
        table_of(kind_of("adjacent", 2).partitions, pooled, name="u", operation=operation),
        hashed_table(pooled, operation=operation),
        plain_table(pooled, name="p", num_embeddings=4),
    ]
    collection = collection_of(tables)
    randomize(collection, 0)
    bags = [[x] for x in ANY]
    features = batch({"f_u": [[n] for n in range(len(ANY))], "f": bags, "f_p": [[3]] * len(ANY)})
    module = getattr(collection, "embedding_bags" if pooled else "embeddings")["t"]
    reference = oracle_of(tables[1], KIND, module)
    expected = torch.stack([reference.embed(x) for x in ANY])
    expected.sum().backward()

    def by_given_parameters() -> Any:
        return functional_call(collection, dict(collection.named_parameters()), (features,))

    with without_kernels():
        in_pytorch = collection(features)
    for out in (collection(features), in_pytorch, by_given_parameters()):
        collection.zero_grad()
        assert_near(values_of(out).detach(), expected.detach(), 1e-5)
        values_of(out).sum().backward()
        for weight, exact in zip(module.weights(), reference.weights, strict=True):
            assert exact.grad is not None
            assert_near(weight.grad, exact.grad, 1e-5)


def test_need_indices_returns_the_given_ids() -> None:
    collection = collection_of([hashed_table(False)])
    collection._need_indices = collection._lookup._need_indices = True
    assert collection(batch({"f": [ANY]}))["f"].weights().tolist() == ANY


def test_a_class_map_has_the_classes_of_hashed_ids() -> None:
    kind = kind_of("explicit", 2).hashed(seed=0)
    assert isinstance(kind.partitions, ExplicitPartitions)
    config = bag_table(kind.partitions, id_hash="splitmix64")
    collection = collection_of([config])
    reference = oracle_of(config, kind, collection.embedding_bags["t"])
    expected = torch.stack([reference.embed(x) for x in ANY])
    assert_near(collection(batch({"f": [[x] for x in ANY]}))["f"].detach(), expected.detach(), 1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id_hash": "md5"}, r"table 't': id_hash='md5'; allowed: None, splitmix64"),
        ({"id_hash": True}, r"id_hash=True; allowed: None, splitmix64"),
        ({"hash_seed": 1}, r"table 't': hash_seed=1; allowed: 0, except beside id_hash"),
        ({"id_hash": "splitmix64", "hash_seed": -1}, r"hash_seed=-1; allowed: an int between 0 and 2147483647"),
        ({"id_hash": "splitmix64", "hash_seed": 2**31}, r"hash_seed=2147483648; allowed"),
        ({"id_hash": "splitmix64", "hash_seed": 1.0}, r"hash_seed=1.0; allowed: an int"),
        ({"id_hash": "splitmix64", "out_of_range": "wrap"}, r"table 't': out_of_range='wrap'; allowed: .*'error'"),
        ({"id_hash": "splitmix64", "out_of_range": "unchecked"}, r"out_of_range='unchecked'; allowed: .*splitmix64"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bag_table(QuotientRemainder(num_collisions=4), **fields)


def test_a_checkpoint_of_another_seed_is_refused() -> None:
    saved = collection_of([hashed_table()]).state_dict()
    for fields, message in (
        ({"id_hash": "splitmix64", "hash_seed": 8}, "hash_seed: saved 7, here 8"),
        ({}, "id_hash: saved splitmix64, here none"),
    ):
        with pytest.raises(ValueError, match=f"table 't': the checkpoint is of another table: {message}"):
            collection_of([bag_table(KIND.partitions, **fields)]).load_state_dict(saved)
    collection_of([hashed_table()]).load_state_dict(saved)


@pytest.mark.parametrize(
    ("num_live", "num_ids", "pairs"),
    [(10**5, 2**27, 29), pytest.param(10**7, 2**40, 55, marks=pytest.mark.slow)],
)
def test_live_ids_that_share_an_id_are_few(num_live: int, num_ids: int, pairs: int) -> None:
    """n²/2S are 37.3 and 45.5 pairs, with standard deviations of 6.1 and 6.7."""
    _, counts = hashed_ids(torch.arange(num_live), 0, num_ids).unique(return_counts=True)
    assert int((counts * (counts - 1) // 2).sum()) == pairs
    expected = num_live**2 / (2 * num_ids)
    assert abs(pairs - expected) <= 1.5 * math.sqrt(expected)
