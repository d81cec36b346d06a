"""What cannot work ends every rank at once, with an error that names it: no hang, no wrong row."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import Any

import pytest
import torch
from global_batches import batch_of
from placements import BASIC_SHARDINGS, SHARDINGS, grid_of, plan_of, table_column_wise
from ranks import run_ranks
from sharded_model import NUM_IDS, Model, distributed, sequences, shard, table, two_tables, unsharded
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import EmbeddingBagConfig
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import DataType

from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingCollection,
    QuotientRemainder,
    ids,
    late_errors,
)
from torchrec_qr.distributed import (
    CompositionalEmbeddingBagCollectionSharder,
    CompositionalEmbeddingCollectionSharder,
)
from torchrec_qr.distributed.logical_tables import IN_STORES, check_plain_tables, check_plan
from torchrec_qr.ops.cpu_library import without_kernels

JOB = Path(__file__).with_name("faulty_job.py")
TABLES = two_tables()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("out_of_range", "IndexError: table 'a', feature 'f_a': id 60 is outside [0, 60)"),
        pytest.param(
            "float",
            "TypeError: table 'a', feature 'f_a': ids have dtype torch.float32; allowed: int32, int64",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_ids_on_one_rank_end_the_job(fault: str, message: str) -> None:
    """A whole `torch.distributed.run` job of two ranks, of which the second reads the bad batch in its second step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(JOB), fault]
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}:{tests}"}
    ready, lines = monotonic(), []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        assert job.stdout is not None
        # A rank that hangs would never close its output.
        watch = Timer(180, job.terminate)
        watch.start()
        for line in job.stdout:
            lines.append(line)
            if "rank 1: step 0 done" in line:
                ready = monotonic()
        watch.cancel()
    output = "".join(lines)
    assert job.returncode == 1, output
    assert message in output, output
    assert "rank 1: step 0 done" in output
    assert "step 1 done" not in output
    assert monotonic() - ready < 30  # from the last good step on: starting the job is not what is timed


@pytest.mark.parametrize(
    "kernel", [k.value for k in EmbeddingComputeKernel if k.value not in ("dense", "fused")], ids=str
)
def test_other_compute_kernels_are_refused(kernel: str) -> None:
    generate = table_wise(rank=0, compute_kernel=kernel)
    plan = {
        "a": generate(torch.nn.Parameter(torch.empty(8, 4)), 1, 1, "cpu", CompositionalEmbeddingBagCollectionSharder())
    }
    with pytest.raises(NotImplementedError, match=f"table 'a': compute kernel '{kernel}' .*allowed: fused, dense"):
        check_plan({"a": TABLES[0]}, plan)


def check_plain(config: EmbeddingBagConfig, device: torch.device | None, kernel: str = "fused") -> None:
    """Checks a plain table beside a compositional one in bf16, which is allowed."""
    plan = {config.name: ParameterSharding("table_wise", kernel)}
    parameters = {config.name: torch.nn.Parameter(torch.empty(9, 8, device="meta"))}
    check_plain_tables([replace(TABLES[0], data_type=DataType.BF16), config], plan, parameters, device)


def test_a_plain_table_in_bf16_is_refused_on_a_cpu() -> None:
    plain = EmbeddingBagConfig(num_embeddings=9, embedding_dim=8, name="p", data_type=DataType.BF16)
    match = r"table 'p': data_type=BF16 .* one partition, MixedRadix\(sizes=\[9\]\)"
    for device in (None, torch.device("cpu")):
        with pytest.raises(NotImplementedError, match=match):
            check_plain(plain, device)
    check_plain(plain, torch.device("cuda"))
    check_plain(replace(plain, data_type=DataType.FP16), None)


@pytest.mark.parametrize("kernel", [k for k in IN_STORES if k in {e.value for e in EmbeddingComputeKernel}])
def test_a_plain_table_in_a_store_of_its_own_is_refused_on_a_cpu(kernel: str) -> None:
    plain = EmbeddingBagConfig(num_embeddings=9, embedding_dim=8, name="p")
    match = f"table 'p': compute kernel '{kernel}' of a plain table .* on cpu; allowed: fused, fused_uvm, fused_uvm_c"
    with pytest.raises(NotImplementedError, match=match):
        check_plain(plain, None, kernel)
    check_plain(plain, torch.device("cuda"), kernel)
    check_plain(plain, None, "fused_uvm")


def refused(rank: int, world_size: int) -> dict[str, str]:
    path = table("p", QuotientRemainder(num_collisions=7), "path", path_hidden=3)
    messages = {}
    plans: dict[str, ParameterShardingGenerator] = {
        "column_wise": column_wise(ranks=[0, 0]),
        "table_column_wise": table_column_wise(ranks=[0, 0]),
        "grid_shard": grid_of(hosts=[0, 0]),
    }
    for sharding, plan in plans.items():
        with pytest.raises(ValueError, match="allowed: ") as error:
            shard([path], {"p": plan})
        messages[sharding] = str(error.value)
    with pytest.raises(ValueError, match="table 's': operation='path' cannot be column_wise"):
        shard_sequence({"operation": "path"}, column_wise(ranks=[0, 0]))
    uvm = table_wise(rank=0, compute_kernel="fused_uvm_caching")
    with pytest.raises(NotImplementedError, match="table 'a': compute kernel 'fused_uvm_caching'"):
        shard(list(TABLES), {t.name: uvm for t in TABLES})
    with pytest.raises(NotImplementedError, match="table 's': compute kernel 'fused_uvm_caching'"):
        shard_sequence({}, uvm)
    return messages


def shard_sequence(fields: dict[str, Any], plan: ParameterShardingGenerator) -> DistributedModelParallel:
    collection = CompositionalEmbeddingCollection(tables=[sequences(**fields)], device=torch.device("meta"))
    sharder = CompositionalEmbeddingCollectionSharder()
    return distributed(Model(collection), plan_of(collection, {"s": plan}, sharder), [sharder])


def test_plans_that_cannot_work_are_refused() -> None:
    (messages,) = run_ranks(refused, 1)
    for sharding, message in messages.items():
        assert message.startswith(f"table 'p': operation='path' cannot be {sharding}")
        assert message.endswith(
            "allowed: table_wise, row_wise, table_row_wise, data_parallel "
            "(a planner takes sharding_types of ParameterConstraints)"
        )


def whole_columns(rank: int, world_size: int) -> None:
    path = table("p", QuotientRemainder(num_collisions=7), "path", path_hidden=3)
    values = unsharded([path])
    batch = batch_of([path], 0, rank, world_size)
    for plan in (column_wise(ranks=[1]), table_column_wise(ranks=[0]), grid_of(hosts=[0])):
        torch.testing.assert_close(shard([path], {"p": plan}, values=values)(batch), values(batch))


def test_a_path_may_have_one_shard_of_all_its_columns() -> None:
    """What a planner's column-wise amounts to, of a table too narrow to be cut."""
    run_ranks(whole_columns, 2)


def reshard(rank: int, world_size: int) -> None:
    model = shard(list(TABLES), "table_wise")
    moved = model.plan.get_plan_for_module("collection")
    message = "dynamic resharding is not supported by sharded compositional collections"
    with pytest.raises(NotImplementedError, match=message):
        model.reshard(sharded_module_fqn="collection", changed_shard_to_params={"collection": (0.0, moved)})
    before = model(batch_of(list(TABLES), 0, rank, world_size))
    with pytest.raises(NotImplementedError, match=message):
        model.module.collection.update_shards(moved, model._env, torch.device("cpu"))
    assert torch.equal(model(batch_of(list(TABLES), 0, rank, world_size)), before)
    with pytest.raises(NotImplementedError, match=message):
        CompositionalEmbeddingCollectionSharder().reshard(shard_sequence({}, table_wise(rank=0)), moved, model._env)


def test_dynamic_resharding_is_refused() -> None:
    run_ranks(reshard, 1)


def test_sharders_offer_what_is_tested() -> None:
    """Of each type a kernel that `test_parity_pooled` and `test_parity_sequence` train with, on every device."""
    bags, sequences = CompositionalEmbeddingBagCollectionSharder(), CompositionalEmbeddingCollectionSharder()
    for device in ("cpu", "cuda", "meta"):
        assert sorted(bags.sharding_types(device)) == sorted(SHARDINGS)
        assert sorted(sequences.sharding_types(device)) == sorted(BASIC_SHARDINGS)
        for sharder in (bags, sequences):
            for sharding in sharder.sharding_types(device):
                kernel = "dense" if sharding == "data_parallel" else "fused"
                assert sharder.compute_kernels(sharding, device) == [kernel]


def test_different_optimizers_in_one_table_are_refused() -> None:
    model = Model(CompositionalEmbeddingBagCollection(tables=list(TABLES)))
    first, second, *_ = model.collection.get_submodule("embedding_bags.a").parameters()
    _apply_optimizer_in_backward(torch.optim.SGD, [first], {"lr": 0.1})
    _apply_optimizer_in_backward(torch.optim.Adagrad, [second], {"lr": 0.1})
    with pytest.raises(ValueError, match="table 'a': its partitions have different optimizers attached"):
        CompositionalEmbeddingBagCollectionSharder().shardable_parameters(model.collection)


def test_different_optimizers_in_one_table_of_sequences_are_refused() -> None:
    collection = CompositionalEmbeddingCollection(tables=[sequences("a")])
    first, second, *_ = collection.embeddings["a"].parameters()
    _apply_optimizer_in_backward(torch.optim.SGD, [first], {"lr": 0.1})
    _apply_optimizer_in_backward(torch.optim.SGD, [second], {"lr": 0.2})
    with pytest.raises(ValueError, match="table 'a': its partitions have different optimizers attached"):
        CompositionalEmbeddingCollectionSharder().shardable_parameters(collection)


class Checks(TorchDispatchMode):
    """Counts the range checks: one ``aminmax`` each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.aminmax.default
        return func(*args, **(kwargs or {}))


def count_checks(rank: int, world_size: int) -> dict[str, int]:
    plans: dict[str, ParameterShardingGenerator] = {
        "table_wise": table_wise(rank=0),
        "column_wise": column_wise(ranks=[0, 0, 0]),
        "row_wise": row_wise(),
        "grid_shard": grid_of(hosts=[0]),
    }
    counts = {}
    for name, plan in plans.items():
        model = shard(list(TABLES), {t.name: plan for t in TABLES})
        # The kernels check all ids of a batch in one pass instead.
        with without_kernels(), Checks() as checks:
            model(batch_of(list(TABLES), 0, rank, world_size))
        counts[name] = checks.count
    return counts


def test_ids_of_a_feature_are_checked_once_whatever_the_plan() -> None:
    (counts,) = run_ranks(count_checks, 1)
    assert counts == {"table_wise": 2, "column_wise": 2, "row_wise": 2, "grid_shard": 2}


class Arrived:
    """The event of a check whose result has come to the host."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def deferred(rank: int, world_size: int) -> list[str]:
    messages = []
    for sharding in ("table_wise", "row_wise", "data_parallel"):
        model = shard(list(TABLES), sharding)
        batch = batch_of(list(TABLES), 0, rank, world_size)
        before = model(batch)
        # As a batch on a GPU would leave it behind.
        space = ids.IdSpace("a", "f_a", NUM_IDS, "error")
        late_errors._late.add(partial(ids.raise_if_outside, 0, NUM_IDS, space), Arrived())
        with pytest.raises(IndexError) as error:
            model(batch)
        messages.append(str(error.value))
        assert torch.equal(model(batch), before)
    return messages


def test_a_sharded_batch_raises_what_an_earlier_one_left_to_be_checked() -> None:
    (messages,) = run_ranks(deferred, 1)
    for message in messages:
        assert message.startswith("table 'a', feature 'f_a': id 60 is outside [0, 60)")


def other_keys(rank: int, world_size: int) -> None:
    configs = list(TABLES)
    model = shard(configs, "table_wise")
    first = batch_of(configs, 0, rank, world_size)
    keys = first.keys()
    with pytest.raises(KeyError, match=f"feature {keys[-1]!r} is not in the batch; its keys are"):
        model(first.permute(list(range(len(keys) - 1))))
    out = model(first)
    with pytest.raises(ValueError, match=f"feature {keys[0]!r}: the batch has the keys .* at place 0, where the first"):
        model(first.permute(list(reversed(range(len(keys))))))
    assert torch.equal(model(first), out)


def test_features_at_other_places_than_in_the_first_batch_are_refused() -> None:
    run_ranks(other_keys, 1)
