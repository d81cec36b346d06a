"""Tables of which each node has a copy; `tests/cuda_without_gpu/test_waits_nodes.py` trains more kinds of them."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from assert_all_close import assert_all_close
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from global_batches import batch_of
from parity_model import OPTIMIZERS, Run, TableCase, train
from parity_reference import assert_trained_as_reference
from pieces import gathered
from placements import PER_NODE, placements, plan_of
from ranks import run_ranks
from sharded_model import (
    ADAGRAD,
    LR,
    SGD,
    Model,
    contents,
    distributed,
    own_weights,
    sequences,
    shard,
    sharders_of,
    state_of,
    table,
    tables,
    two_tables,
    unsharded,
    weights_of,
)
from sharded_model import train as train_steps
from single_tables import collection_of
from test_pipelines import CPU, WithLoss, assert_all_equal, batches, drain, step
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.sharding_plan import column_wise, data_parallel, row_wise, table_row_wise, table_wise
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_qr import ExplicitPartitions, QuotientRemainder
from torchrec_qr.distributed import per_node
from torchrec_qr.distributed.copied_rows import padded_unique, unique_rows

CASES = tuple(TableCase(s, "strided", s, plan="hand") for s in PER_NODE)


@pytest.mark.parametrize(
    "optimizer", [o if o == "adam" else pytest.param(o, marks=pytest.mark.slow) for o in OPTIMIZERS]
)
def test_trains_as_reference(optimizer: str) -> None:
    run = Run(CASES, optimizer, weighted=True)
    assert_trained_as_reference(run, run_ranks(train, 4, run, local_world_size=2))


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "local_size"), [(2, 1), (2, 2), (3, 1)])
def test_any_number_of_nodes(world_size: int, local_size: int) -> None:
    run = Run(CASES, "rowwise_adagrad", bags=12)
    assert_trained_as_reference(run, run_ranks(train, world_size, run, local_world_size=local_size))


def drawn(rank: int, world_size: int) -> int:
    """Fails if two nodes hold other values."""
    values = gathered(own_weights(shard(tables(), "row_wise_per_node")))
    return len({float(value.flatten()[0]) for value in values.values()})


def test_copies_are_drawn_alike() -> None:
    torch.manual_seed(0)
    assert run_ranks(drawn, 4, local_world_size=2)[0] > 10, "the values are not drawn"


SIZES = (3, 1, 0, 2)


def step_on(rank: int, world_size: int, divides: bool) -> None:
    """One step of batches of `SIZES`, of which the second node has no ids of table b, against autograd."""
    set_gradient_division(divides)
    configs = two_tables()
    values = unsharded(configs)
    model = shard(configs, "table_wise_per_node", SGD, values)
    of_ranks = [
        KeyedJaggedTensor(
            ["f_a", "f_b"],
            torch.arange((2 if r < 2 else 1) * n) + 10 * r,
            lengths=torch.tensor([1] * n + [int(r < 2)] * n, dtype=torch.int64),
        )
        for r, n in enumerate(SIZES)
    ]
    expected = [values(batch) for batch in of_ranks]
    torch.cat(expected).sum().backward()
    out = model(of_ranks[rank])
    torch.testing.assert_close(out, expected[rank])
    out.sum().backward()
    set_gradient_division(True)
    with torch.no_grad():
        for p in values.collection.parameters():
            p -= LR * p.grad / (world_size if divides else 1)
    assert_all_close(weights_of(model), values.state_dict(), "weights", rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divides", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nodes_with_uneven_batches_step_alike(divides: bool) -> None:
    run_ranks(step_on, 4, divides, local_world_size=2)


def train_on_hashed_ids(rank: int, world_size: int) -> None:
    """Compares copies with a table of all ranks, whose forward is that of the unsharded module."""
    strided, mapped = QuotientRemainder(num_collisions=7), ExplicitPartitions(torch.arange(60).repeat(2, 1))
    configs = [table("a", strided, "mult", id_hash="splitmix64"), table("b", mapped, "add", id_hash="splitmix64")]
    values = unsharded(configs)
    trained = {}
    for sharding in ("table_wise", *PER_NODE):
        model = shard(configs, sharding, ADAGRAD, values)
        batch = batch_of(configs, 0, rank, world_size)
        torch.testing.assert_close(model(batch), values(batch), rtol=1e-5, atol=1e-6)
        train_steps(model, configs, range(2))
        trained[sharding] = weights_of(model)
    for sharding in PER_NODE:
        assert_all_close(trained[sharding], trained["table_wise"], sharding, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_ids_are_hashed_once() -> None:
    run_ranks(train_on_hashed_ids, 4, local_world_size=2)


def freeze(rank: int, world_size: int) -> None:
    configs = two_tables()
    model = shard(configs, "row_wise_per_node", ADAGRAD, unsharded(configs))
    before = weights_of(model)
    for name, p in model.named_parameters():
        p.requires_grad_(".a." not in name)
    train_steps(model, configs, range(2))
    moved = {name.split(".")[2] for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert moved == {"b"}


@pytest.mark.slow
def test_a_frozen_copy_stays() -> None:
    run_ranks(freeze, 4, local_world_size=2)


def save(rank: int, world_size: int, sharding: str, folder: Path) -> None:
    model = shard(tables(), sharding, EmbOptimType.ADAM, unsharded(tables()))
    train_steps(model, tables(), range(3))
    dcp.save(contents(model), checkpoint_id=folder / sharding)
    expected = weights_of(model), state_of(model)
    if rank == 0:
        torch.save(expected, folder / f"{sharding}.pt")


def load(rank: int, world_size: int, sharding: str, saved: str, folder: Path) -> None:
    model = shard(tables(), sharding, EmbOptimType.ADAM, unsharded(tables(), seed=2))
    train_steps(model, tables(), range(90, 91))
    dcp.load(contents(model), checkpoint_id=folder / saved)
    weights, state = torch.load(folder / f"{saved}.pt")
    assert_all_close(weights_of(model), weights, f"{saved} → {sharding}: weights")
    assert_all_close(state_of(model), state, f"{saved} → {sharding}: state")


@pytest.mark.slow
def test_checkpoints_move_between_copies_and_other_plans(tmp_path: Path) -> None:
    for sharding in PER_NODE:
        run_ranks(save, 4, sharding, tmp_path, local_world_size=2)
        run_ranks(load, 2, "column_wise", sharding, tmp_path)
        run_ranks(load, 4, "table_wise_per_node", sharding, tmp_path, local_world_size=2)
    run_ranks(save, 2, "row_wise", tmp_path)
    for sharding in PER_NODE:
        run_ranks(load, 4, sharding, "row_wise", tmp_path, local_world_size=2)


def pipeline(rank: int, world_size: int) -> None:
    """Copies and tables of all ranks in one collection, whose ids a pipeline sends ahead."""
    configs = tables()
    kinds = ("table_wise", *PER_NODE, "row_wise", *PER_NODE, "table_wise")
    types = {t.name: kind for t, kind in zip(configs, kinds, strict=True)}
    models = [shard(configs, placements(configs, types), values=unsharded(configs), wrap=WithLoss) for _ in range(2)]
    optimizers = [CombinedOptimizer([model.fused_optimizer, _dense(model)]) for model in models]
    data = batches(rank, world_size, weighted=False)
    made = TrainPipelineSparseDist(models[1], optimizers[1], CPU, execute_all_batches=True)
    expected = [step(models[0], optimizers[0], batch) for batch in data]
    outputs = drain(made.progress, data)
    assert_all_equal(outputs, expected, "pipelined")
    assert_all_close(weights_of(models[1]), weights_of(models[0]), "weights")


def _dense(model: nn.Module) -> KeyedOptimizerWrapper:
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    return KeyedOptimizerWrapper(dense, lambda ps: torch.optim.SGD(ps, lr=0.1))


@pytest.mark.slow
def test_a_pipeline_sends_ids_of_copies_ahead() -> None:
    run_ranks(pipeline, 4, local_world_size=2)


def refused(rank: int, world_size: int) -> list[str]:
    """Returns the messages of what is not supported."""
    strided, messages = two_tables()[:1], []
    fused = {"optimizer": SGD, "learning_rate": LR}
    nodes = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    of_node = {"env": ShardingEnv.from_process_group(nodes[rank // 2])}
    as_dtensor = {"env": ShardingEnv(world_size, rank, dist.GroupMember.WORLD, output_dtensor=True)}
    for configs, generator, fused_params, arguments in (
        (tables()[-1:], per_node(table_wise(rank=0)), fused, {}),
        (strided, per_node(table_wise(rank=0)), {}, {}),
        ([sequences()], per_node(column_wise(ranks=[0, 1])), fused, {}),
        (strided, per_node(table_wise(rank=2)), fused, {}),
        (strided, per_node(table_row_wise(host_index=0)), fused, {}),
        (strided, per_node(data_parallel()), fused, {}),
        (strided, per_node(row_wise()), fused, of_node),
        (strided, per_node(row_wise()), fused, as_dtensor),
    ):
        collection = collection_of(configs, "meta")
        sharders = sharders_of(fused_params)
        sharder = next(s for s in sharders if s.module_type is type(collection))
        try:
            plan = plan_of(collection, {configs[0].name: generator}, sharder)
            distributed(Model(collection), plan, sharders, **arguments)
        except (NotImplementedError, ValueError) as error:
            messages.append(str(error))
    return messages


def test_what_is_not_supported_is_refused_by_name() -> None:
    for messages in run_ranks(refused, 4, local_world_size=2):
        for message, beginning in zip(
            messages,
            (
                "table 'plain': table_wise_per_node of a plain table is not supported",
                "tables ['a']: a copy per node without a fused optimizer is not supported; allowed: the optimizer in",
                "table 's': column_wise_per_node without pooling is not supported; allowed: table_wise_per_node",
                "per_node: ranks [2] of a node; allowed: 0 to 1, whatever the node",
                "per_node: table_row_wise within a node; allowed: table_wise, column_wise, row_wise",
                "per_node: data_parallel within a node; allowed: table_wise, column_wise, row_wise",
                "tables ['a']: a copy per node in a sharding environment of a part of the ranks, as of DMPCollection",
                "tables ['a']: a copy per node with output_dtensor=True of the sharding environment is not supported",
            ),
            strict=True,
        ):
            assert message.startswith(beginning), message


def test_unique_rows_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (0, 1, 100):
        rows = torch.randint(0, 30, (n,), generator=generator)
        expected = rows.unique(return_inverse=True)
        for num_rows in (30, 10_000):
            assert all(map(torch.equal, unique_rows(rows, num_rows), expected)), (n, num_rows)
        unique, numbers = padded_unique(rows)
        assert unique.tolist() == [*expected[0].tolist(), *[-1] * (n - len(expected[0]))]
        assert torch.equal(numbers, expected[1])
