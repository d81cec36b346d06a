"""Sharded unpooled collections train as the unsharded float64 reference does, whatever the plan and the world size."""

from functools import partial

import parity_model
import pytest
import torch
from pairwise import all_pairs, pairs_of, pairwise
from parity_model import Run, TableCase, hand_plan, shard_run, train
from parity_reference import assert_trained_as_reference
from placements import BASIC_SHARDINGS
from ranks import run_ranks
from sharded_model import Model, distributed
from test_parity_pooled import FACTORS, raised, runs_of
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, EmbeddingModuleShardingPlan
from varied_runs import possible

from torchrec_qr import CompositionalEmbeddingCollection

SEQUENCE_FACTORS = {
    **{name: values for name, values in FACTORS.items() if name not in ("pooling", "weighted")},
    "sharding": BASIC_SHARDINGS,
}
one_of_each = partial(parity_model.one_of_each, BASIC_SHARDINGS)
CASES = pairwise(SEQUENCE_FACTORS, possible)
RUNS = runs_of(CASES, pooled=False)


def test_every_pair_of_values_occurs() -> None:
    occurring = {pair for case in CASES for pair in pairs_of(case, SEQUENCE_FACTORS)}
    assert set(all_pairs(SEQUENCE_FACTORS, possible)) == occurring
    assert sum(table.kind != "plain" for run in RUNS.values() for table in run.tables) == len(CASES)


@pytest.mark.parametrize("key", RUNS, ids=str)
def test_trains_as_reference(key: tuple[int, str, bool]) -> None:
    assert_trained_as_reference(RUNS[key], run_ranks(train, key[0], RUNS[key]))


# One feature in a row-wise, a table-wise and a plain table; several features per table; fewer base rows than ranks.
SHARED = (
    TableCase("rw", "strided", "row_wise", features=("f0", "f1"), operation="add"),
    TableCase("tw", "explicit", "table_wise", features=("f2", "f0")),
    TableCase("plain", "plain", "table_wise", features=("f0", "f3")),
    TableCase("cw", "chinese_remainder", "column_wise", k=3, operation="concat", features=("f3", "f1"), plan="hand"),
    TableCase("dp", "adjacent", "data_parallel", features=("f2", "f1")),
    TableCase("tiny", "tiny", "row_wise", operation="path"),
)


@pytest.mark.parametrize("index_dedup", [False, True])
def test_shared_features(index_dedup: bool) -> None:
    tables = (*SHARED, *one_of_each(hash_seed=3))
    run = Run(tables, optimizer="adagrad", pooled=False, int32=not index_dedup, index_dedup=index_dedup)
    assert_trained_as_reference(run, run_ranks(train, 4, run, local_world_size=2))


def test_world_sizes_agree() -> None:
    """1, 2 and 4 ranks give the outputs and weights of one reference, for the same global batch."""
    run = Run((*SHARED, *one_of_each()), optimizer="adagrad", pooled=False)
    for world_size in (1, 2, 4):
        assert_trained_as_reference(run, run_ranks(train, world_size, run, local_world_size=min(world_size, 2)))


def refused(rank: int, world_size: int, run: Run) -> str:
    model = Model(run.collection("meta"))
    sharders = run.sharders()
    plan = EmbeddingModuleShardingPlan()
    for table, width in zip(run.tables, (4, 8), strict=True):
        plan[table.name] = hand_plan(model.collection, list(run.tables), sharders[1], width)[table.name]
    with pytest.raises(ValueError, match="column_wise") as error:
        distributed(model, plan, sharders)
    return str(error.value)


def test_column_shards_of_different_widths_are_refused() -> None:
    """TorchRec takes the first width for all and reads past the ends of the others."""
    run = Run((TableCase("a", "strided", "column_wise"), TableCase("b", "plain", "column_wise")), pooled=False)
    (message,) = run_ranks(refused, 1, run)
    assert "shards of {'a': [4, 4, 4, 4], 'b': [8, 8]} columns; allowed: one width" in message


def refused_types(rank: int, world_size: int) -> dict[str, str]:
    messages = {}
    for sharding in ("table_column_wise", "table_row_wise", "grid_shard"):
        run = Run((TableCase("t", "strided", sharding, plan="hand"),), pooled=False)
        with pytest.raises(ValueError, match=sharding) as error:
            shard_run(run)
        messages[sharding] = str(error.value)
        assert sharding not in run.sharder(run.sharders()).sharding_types("cpu")
    return messages


def test_other_sharding_types_are_refused_by_name() -> None:
    for sharding, message in run_ranks(refused_types, 1)[0].items():
        assert message == (
            f"tables ['t']: sharding type {sharding!r} is not supported for sequences; "
            "allowed: table_wise, column_wise, row_wise, data_parallel"
        )


def quantised(rank: int, world_size: int, run: Run) -> dict[str, bool]:
    """Whether each output is the one of exact communication rounded to bf16, of two models."""
    config = QCommsConfig(forward_precision=CommType.BF16, backward_precision=CommType.BF16)
    # Not of TorchRec's registry, which replaces bf16 by fp16 on a CPU.
    codecs = {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: get_qcomm_codecs(config)}
    kjt = run.own_batch(0)
    exact, rounded = (
        shard_run(run).module.collection(kjt),
        shard_run(run, run.sharders(codecs=codecs)).module.collection(kjt),
    )
    found = {}
    for name, _, _ in run.outputs():
        value = exact[name].values()
        assert value.numel()
        assert not torch.equal(value, value.bfloat16().float())
        torch.testing.assert_close(rounded[name].values(), value, rtol=1e-2, atol=0)
        found[name] = torch.equal(rounded[name].values(), value.bfloat16().float())
    return found


def test_quantised_communication() -> None:
    """Data-parallel tables exchange no embeddings, and so round none."""
    run = Run(one_of_each(), pooled=False)
    for found in run_ranks(quantised, 2, run):
        assert found == {f"f_{s}": s != "data_parallel" for s in BASIC_SHARDINGS}


@pytest.mark.parametrize("index_dedup", [False, True])
def test_out_of_range_error_names_the_id(index_dedup: bool) -> None:
    run = Run(one_of_each(), pooled=False, index_dedup=index_dedup)
    for message in run_ranks(raised, 2, run):
        assert "table 'table_wise', feature 'f_table_wise': id 100 is outside [0, 100)" in message


def indices(rank: int, world_size: int, run: Run) -> list[tuple[str, bool]]:
    """Per output, whether the ids that come with it are those of the unsharded module."""
    values = run.initial()
    collection, reference = (
        CompositionalEmbeddingCollection(values.embedding_configs(), torch.device(device), need_indices=True)
        for device in ("meta", "cpu")
    )
    reference.load_state_dict(values.state_dict())
    dmp = shard_run(run, collection=collection)
    kjt = run.own_batch(0)
    out, expected = dmp.module.collection(kjt), reference(kjt)
    found = []
    for name, value in expected.items():
        torch.testing.assert_close(out[name].values(), value.values(), rtol=1e-6, atol=1e-6)
        found.append((name, out[name].weights().tolist() == value.weights().tolist()))
        assert out[name].lengths().tolist() == value.lengths().tolist()
    return found


@pytest.mark.parametrize("index_dedup", [False, True])
def test_need_indices(index_dedup: bool) -> None:
    """The ids come with the embeddings, also where rows are split, as the unsharded module returns them."""
    run = Run((*SHARED, *one_of_each(hash_seed=3)), pooled=False, index_dedup=index_dedup)
    for rank in run_ranks(indices, 2, run):
        assert rank == [(name, True) for name, _, _ in run.outputs()]
