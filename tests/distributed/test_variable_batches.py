"""Sharded collections train on a number of bags for each feature as the float64 reference does on the samples."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from global_batches import Batch, global_batch
from parity_model import TableCase, Trained, one_of_each, shard_run, trained
from parity_reference import assert_trained_as_reference
from placements import SHARDINGS
from ranks import run_ranks
from sharded_model import DIM, Model, sequences, shard, table, two_tables, unsharded
from shared_bags import SharedBags, shared
from single_tables import collection_of
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import PoolingType

from torchrec_qr import QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingCollectionSharder

# The ranks of these may differ in their numbers of bags.
UNEVEN = ("table_wise", "column_wise", "table_column_wise", "row_wise", "data_parallel")
MIXED = (
    TableCase("plain_tw", "plain", "table_wise", features=("f0", "f3")),
    TableCase("plain_rw", "plain", "row_wise", features=("f1",), pooling="mean"),
    TableCase("tw", "explicit", "table_wise", features=("f2", "f0"), pooling="mean"),
    TableCase("cw", "chinese_remainder", "column_wise", k=3, operation="concat", features=("f3", "f1"), plan="hand"),
    TableCase("twcw", "strided", "table_column_wise", features=("f4",), pooling="mean", plan="hand"),
    TableCase("rw", "adjacent", "row_wise", operation="add", features=("f5", "f1"), dim=8, pooling="mean"),
    TableCase("path", "strided", "row_wise", operation="path", features=("f0",), dim=8),
    TableCase("dp", "mixed_radix", "data_parallel", features=("f2", "f5"), dim=4, pooling="mean"),
)


def train(rank: int, world_size: int, run: SharedBags) -> tuple[Trained, list[list[int]]]:
    """Beside the results, the numbers of bags of the features at each step."""
    batches = [run.own_batch(step) for step in range(run.steps)]
    model = shard_run(run)
    initial = Model(run.initial())
    with torch.no_grad():
        # The same as the unsharded module, from the same shared bags and from the samples.
        alone = initial(batches[0])
        samples = run.batch(0).part(rank, world_size).kjt(run.weighted, run.int32)
        torch.testing.assert_close(alone, initial(samples))
        torch.testing.assert_close(model(batches[0]), alone)
    return trained(rank, world_size, run, model), [batch.stride_per_key() for batch in batches]


def assert_trained(run: SharedBags, world_size: int) -> None:
    results = run_ranks(train, world_size, run, local_world_size=2)
    assert_trained_as_reference(run, [of_rank for of_rank, _ in results])
    numbers = [of_rank for _, of_rank in results]
    assert any(len(set(of_step)) > 1 for of_rank in numbers for of_step in of_rank)
    most = [[max(of_step) for of_step in of_rank] for of_rank in numbers]
    assert any(of_rank != most[0] for of_rank in most), "all ranks have as many bags"


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_trains_as_reference(weighted: bool) -> None:
    optimizer = "adagrad" if weighted else "rowwise_adagrad"
    assert_trained(SharedBags(MIXED, optimizer, weighted, bags=24, int32=weighted), 2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_trains_as_reference_on_more_ranks(world_size: int) -> None:
    tables = (
        *one_of_each(UNEVEN, operation="mult"),
        *(replace(t, name=f"{t.name}_mean") for t in one_of_each(UNEVEN, operation="concat", pooling="mean")),
    )
    run = SharedBags(tables, "adam", weighted=True, bags=32)
    if world_size == 1:
        assert_trained_as_reference(run, [of_rank for of_rank, _ in run_ranks(train, 1, run)])
    else:
        assert_trained(run, world_size)


# --- forms of batches ----------------------------------------------------------------------------------------------

CONFIGS = two_tables()


def samples(step: int, bags: int) -> Batch:
    return global_batch(CONFIGS, step, bags)


def in_turn(rank: int, world_size: int, sharding: str) -> None:
    """Ranks have ordinary batches and shared bags in turn, one of them without samples."""
    values = unsharded(CONFIGS)
    model = shard(CONFIGS, sharding, values=values)
    for step in range(4):
        of_samples = samples(step, 0 if step == 2 else 5 + rank)
        batch = shared(of_samples) if (step + rank) % 2 else of_samples.kjt()
        expected, out = values(batch), model(batch)
        assert out.shape == expected.shape
        torch.testing.assert_close(out, expected)
        (0 * out).sum().backward()
    # Inverse indices count beside one number of bags, too.
    ordinary = samples(4, 3).kjt()
    keys, bags = list(reversed(ordinary.keys())), torch.tensor([[2, 0, 2, 1], [1, 1, 0, 2]])
    expanded = KeyedJaggedTensor(
        ordinary.keys(), ordinary.values(), lengths=ordinary.lengths(), inverse_indices=(keys, bags)
    )
    by_bag = dict(zip(values.names, values(ordinary).split(DIM, dim=1), strict=True))
    by_sample = torch.cat([by_bag[f"f_{c.name}"][bags[keys.index(f"f_{c.name}")]] for c in CONFIGS], dim=1)
    for module in (model, values):
        torch.testing.assert_close(module(expanded), by_sample)
    none = KeyedJaggedTensor(
        keys=["f_a", "f_b"],
        values=torch.empty(0, dtype=torch.int64),
        lengths=torch.zeros(3 * rank, dtype=torch.int64),
        stride_per_key_per_rank=[[rank], [2 * rank]],
        inverse_indices=(["f_a", "f_b"], torch.empty(2, 0, dtype=torch.int64)),
    )
    out = model(none)
    assert out.shape == values(none).shape == (0, 2 * DIM)
    out.sum().backward()


# The others are slow.
QUICK = ("table_wise", "row_wise")


@pytest.mark.parametrize("sharding", [pytest.param(s, marks=[pytest.mark.slow] * (s not in QUICK)) for s in UNEVEN])
def test_ranks_have_ordinary_batches_in_between(sharding: str) -> None:
    run_ranks(in_turn, 2, sharding)


def variable_batch(strides: list[list[int]], inverse: list[list[int]], **fields: Any) -> KeyedJaggedTensor:
    """Bags of one id of features f_a and f_b."""
    count = sum(map(sum, strides))
    return KeyedJaggedTensor(
        keys=["f_a", "f_b"],
        values=torch.arange(count),
        lengths=torch.ones(count, dtype=torch.int64),
        stride_per_key_per_rank=strides,
        **{"inverse_indices": (["f_a", "f_b"], torch.tensor(inverse)), **fields},
    )


def split_on_nodes(rank: int, world_size: int, sharding: str) -> str:
    """Trains on as many bags on all ranks; returns the error of different numbers."""
    values = unsharded(CONFIGS)
    model = shard(CONFIGS, sharding, values=values)
    even = variable_batch([[1], [2]], [[0, 0, 0], [0, 1, 1]]) if rank else variable_batch([[2], [1]], [[1], [0]])
    out = model(even)
    torch.testing.assert_close(out, values(even))
    (0 * out).sum().backward()
    uneven = variable_batch([[1], [2 + rank]], [[0, 0], [1, 0]])
    with torch.no_grad():
        torch.testing.assert_close(model(uneven), values(uneven))
    with pytest.raises(ValueError, match="bags of a feature on the ranks") as error:
        model(uneven)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [s for s in SHARDINGS if s not in UNEVEN])
def test_rows_split_within_nodes_need_one_number_of_bags_on_all_ranks(sharding: str) -> None:
    for message in run_ranks(split_on_nodes, 2, sharding):
        assert message.startswith("tables 'a', 'b': batches of [2, 3] bags of a feature on the ranks, in order")


def refused(rank: int, world_size: int) -> None:
    model = shard(CONFIGS, "row_wise")
    batches: list[tuple[type[Exception], str, KeyedJaggedTensor]] = [
        (
            ValueError,
            r"features \['f_a', 'f_b'\]: \[1, 2\] bags and no inverse indices",
            variable_batch([[1], [2]], [], inverse_indices=None),
        ),
        (
            IndexError,
            r"feature 'f_a': inverse index 1 is outside \[0, 1\), its bags",
            variable_batch([[1], [2]], [[0, 1], [0, 1]]),
        ),
        (
            IndexError,
            r"feature 'f_b': inverse index -1 is outside \[0, 2\), its bags",
            variable_batch([[1], [2]], [[0, 0], [0, -1]]),
        ),
        (
            ValueError,
            r"inverse indices of \['f_a', 'f_b'\] have the shape \(1, 2\); allowed: \(2, samples\)",
            variable_batch([[1], [2]], [[0, 0]]),
        ),
        (
            KeyError,
            r"feature 'f_b': the batch has inverse indices of \['f_a'\] alone",
            variable_batch([[1], [2]], [], inverse_indices=(["f_a"], torch.tensor([[0, 0]]))),
        ),
    ]
    for module in (model, unsharded(CONFIGS)):
        for error, message, batch in batches:
            with pytest.raises(error, match=message):
                module(batch)
    of_sequences = collection_of([sequences(name) for name in "ab"], "meta")
    sharded = DistributedModelParallel(
        of_sequences, device=torch.device("cpu"), sharders=[CompositionalEmbeddingCollectionSharder()]
    )
    with pytest.raises(NotImplementedError, match=r"variable batch per feature is not supported .*\['f_a', 'f_b'\]"):
        sharded(variable_batch([[1], [2]], [[0, 0], [0, 1]]))


def test_wrong_inverse_indices_and_sequences_are_refused_by_name() -> None:
    run_ranks(refused, 1)


def names_with_at(rank: int, world_size: int) -> None:
    """Feature u@x has bags of its own beside feature u, also if an output of u has the name u@a."""
    partitions, mean = QuotientRemainder(num_collisions=7), PoolingType.MEAN
    configs = [
        table("a", partitions, "mult", feature_names=["u", "u@x"], pooling=mean),
        table("b", partitions, "mult", feature_names=["u"]),
    ]
    values = unsharded(configs)
    model = shard(configs, "row_wise", values=values)
    ids, keys = torch.arange(6), ["u", "u@x"]
    ordinary = KeyedJaggedTensor(keys, ids, lengths=torch.tensor([1, 2, 3, 0]))
    torch.testing.assert_close(model(ordinary), values(ordinary))
    of_samples = (keys, torch.tensor([[0, 0], [1, 0]]))
    varies = KeyedJaggedTensor(
        keys, ids, lengths=torch.tensor([1, 3, 2]), stride_per_key_per_rank=[[1], [2]], inverse_indices=of_samples
    )
    out = model(varies)
    torch.testing.assert_close(out, values(varies))
    rows = values(KeyedJaggedTensor(keys, ids.repeat(2), lengths=torch.ones(12, dtype=torch.int64)))[:, DIM : 2 * DIM]
    torch.testing.assert_close(out[:, DIM : 2 * DIM], torch.stack([rows[4:6].mean(0), rows[1:4].mean(0)]))


def test_features_may_have_an_at_sign() -> None:
    run_ranks(names_with_at, 1)
