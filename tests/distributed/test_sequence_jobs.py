"""Sequences in a whole job: checkpoints under other plans and world sizes, and TorchRec's pipelines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from assert_all_close import assert_all_close
from parity_model import Run, TableCase, shard_run
from pieces import Pieces, assembled
from placements import BASIC_SHARDINGS
from ranks import run_ranks
from sharded_model import Model, contents, loss_of, own_state, own_weights, steps_of
from test_pipelines import assert_all_equal, until_its_end
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist, TrainPipelineBase, TrainPipelineSparseDist

from torchrec_qr.distributed.checkpoint import load

CPU = torch.device("cpu")
TABLES = (
    TableCase("mult", "strided", "table_wise"),
    TableCase("concat", "chinese_remainder", "column_wise", k=3, operation="concat"),
    TableCase("add", "explicit", "row_wise", operation="add", features=("f_add", "f_mult")),
    TableCase("dp", "adjacent", "data_parallel"),
    TableCase("plain", "plain", "table_wise"),
)
RUN = Run(TABLES, optimizer="adagrad", pooled=False)


def rotated(by: int, run: Run) -> Run:
    """The run, each compositional table under another sharding type."""

    def turned(table: TableCase) -> TableCase:
        if table.kind == "plain":
            return table
        return replace(
            table, sharding=BASIC_SHARDINGS[(BASIC_SHARDINGS.index(table.sharding) + by) % len(BASIC_SHARDINGS)]
        )

    return replace(run, tables=tuple(map(turned, run.tables)))


def train(dmp: DistributedModelParallel, run: Run, steps: range) -> None:
    list(steps_of(dmp, map(run.own_batch, steps)))


States = tuple[dict[str, Pieces], dict[str, Pieces]]


def states_of(dmp: DistributedModelParallel) -> States:
    return own_weights(dmp), own_state(dmp)


def save(rank: int, world_size: int, run: Run, folder: Path) -> tuple[States, States]:
    dmp = shard_run(run)
    train(dmp, run, range(2))
    dcp.save(contents(dmp), checkpoint_id=folder)
    saved = states_of(dmp)
    train(dmp, run, range(2, 5))
    return saved, states_of(dmp)


def resume(rank: int, world_size: int, run: Run, folder: Path) -> tuple[States, States]:
    dmp = shard_run(run)
    train(dmp, run, range(90, 91))
    load(contents(dmp), checkpoint_id=folder)
    loaded = states_of(dmp)
    train(dmp, run, range(2, 5))
    return loaded, states_of(dmp)


def test_a_checkpoint_continues_under_other_plans_and_world_sizes(tmp_path: Path) -> None:
    expected = run_ranks(save, 2, RUN, tmp_path)
    for by, world_size in ((0, 2), (1, 4), (2, 1), (3, 2)):
        ranks = run_ranks(resume, world_size, rotated(by, RUN), tmp_path, local_world_size=min(2, world_size))
        for when in (0, 1):  # as loaded, and after three more steps
            for what in (0, 1):  # weights, optimizer state
                actual = assembled([rank[when][what] for rank in ranks])
                before = assembled([rank[when][what] for rank in expected])
                assert actual
                tolerance = 0.0 if when == 0 or by == 0 else 1e-5
                assert_all_close(actual, before, f"rotated by {by}", tolerance, tolerance)


def from_unsharded(rank: int, world_size: int, folder: Path) -> dict[str, Pieces]:
    dmp = shard_run(RUN)
    train(dmp, RUN, range(1))
    load({"model": dmp.module.collection}, checkpoint_id=folder / "unsharded")
    loaded = own_weights(dmp)
    train(dmp, RUN, range(1))
    dcp.save({"model": dmp.module.collection}, checkpoint_id=folder / "sharded")
    return loaded


def test_sequences_move_between_sharded_and_unsharded_modules(tmp_path: Path) -> None:
    alone = RUN.initial()
    dcp.save({"model": alone}, checkpoint_id=tmp_path / "unsharded", no_dist=True)
    loaded = assembled(run_ranks(from_unsharded, 2, tmp_path))
    values = {f"collection.{name}": p.detach().double() for name, p in alone.named_parameters()}
    assert_all_close(loaded, values)
    back = RUN.collection()
    load({"model": back}, checkpoint_id=tmp_path / "sharded", no_dist=True)
    moved = dict(back.named_parameters())
    for name, p in alone.named_parameters():
        assert not torch.equal(moved[name], p), name


class WithLoss(Model):
    """As pipelines call a model: (loss, what to return)."""

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(features)
        return loss_of(out, 1), out.detach()


def pipelines(rank: int, world_size: int) -> None:
    plain, expected = shard_run(RUN, model_type=WithLoss), []
    for batch in map(RUN.own_batch, range(6)):
        loss, out = plain(batch)
        loss.backward()
        expected.append(out)
    for kind in (TrainPipelineBase, TrainPipelineSparseDist):
        dmp = shard_run(RUN, model_type=WithLoss)
        pipeline: Any = kind(dmp, dmp.fused_optimizer, CPU)
        outputs = until_its_end(pipeline, map(RUN.own_batch, range(6)))
        assert_all_equal(outputs, expected, kind.__name__)
        weights = own_weights(dmp)
        for name, pieces in own_weights(plain).items():
            for (_, _, value), (_, _, own) in zip(weights[name], pieces, strict=True):
                assert value.tolist() == own.tolist(), (kind.__name__, name)
    assert len(pipeline._pipelined_modules) == 1
    pipeline.detach()
    dmp.eval()
    with torch.no_grad():
        expected = [dmp(batch)[1] for batch in map(RUN.own_batch, range(6))]
        evaluation = EvalPipelineSparseDist(dmp, dmp.fused_optimizer, CPU)
        outputs = until_its_end(evaluation, map(RUN.own_batch, range(6)))
    assert_all_equal(outputs, expected, "evaluation")


def test_pipelines_give_the_outputs_of_a_plain_loop() -> None:
    run_ranks(pipelines, 2)
