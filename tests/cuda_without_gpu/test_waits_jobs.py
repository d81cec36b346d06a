"""Jobs in which more is under way than ids and embeddings read nothing before it has arrived."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from global_batches import batch_of
from parity_model import OPTIMIZERS, Run, one_of_each
from parity_reference import Exact
from placements import BASIC_SHARDINGS, placements
from poison_compare import assert_same, assert_same_order
from poison_group import register
from poison_jobs import Values, by_step, on_poison_as_on_gloo
from poison_tables import Journaled, train_journaled
from ranks import run_ranks
from sharded_model import DIM, EPS, LR, Model, contents, shard, state_of, tables, train, unsharded, weights_of
from test_pipelines import CPU, MIXED, codecs_of
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs, get_qcomm_codecs_registry
from torchrec.distributed.types import CommOp
from torchrec.optim.optimizers import in_backward_optimizer_filter

PRECISIONS = {"fp16": CommType.FP16, "bf16": CommType.BF16}


def of_model(what: str, model: Any, outputs: list[Tensor]) -> Values:
    return by_step(what, outputs) | {f"{what}, {name}": value for name, value in weights_of(model).items()}


def quantised(rank: int, world_size: int, precision: str, by_registry: bool, shardings: tuple[str, ...]) -> Values:
    codecs = codecs_of(PRECISIONS[precision])
    if by_registry:
        codecs = get_qcomm_codecs_registry(QCommsConfig(PRECISIONS[precision], PRECISIONS[precision]), device=CPU)
    values: Values = {}
    for sharding in shardings:
        model = shard(tables(), sharding, values=unsharded(tables()), codecs=codecs)
        values |= of_model(sharding, model, train(model, tables(), range(3)))
    return values


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_quantised_communication(precision: str) -> None:
    """TorchRec's registry has fp16 alone for a CPU. How far it is from exact: `tests/distributed/test_pipelines.py`."""
    two, four = ("table_wise", "column_wise", "row_wise"), ("table_row_wise", "grid_shard")
    on_poison_as_on_gloo(quantised, 2, precision, precision == "fp16", two)
    on_poison_as_on_gloo(quantised, 4, precision, False, four)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantised_communication_of_sequences(precision: str) -> None:
    run = Run(one_of_each(BASIC_SHARDINGS, plan="hand"), pooled=False)
    config = QCommsConfig(PRECISIONS[precision], PRECISIONS[precision])
    compare(run, codecs={CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: get_qcomm_codecs(config)})


def compare(run: Run, **arguments: Any) -> list[Journaled]:
    """Two ranks train the tables on poison as on gloo."""
    plain, poisoned = (run_ranks(train_journaled, 2, run, arguments, backend=b) for b in ("gloo", register))
    for found, expected in zip(poisoned, plain, strict=True):
        assert found.violations == []
        for table in run.tables:
            assert_same(found, expected, run, table)
    assert_same_order([outcome.issued for outcome in poisoned])
    return poisoned


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_clipped_gradients_of_the_fused_optimizer(optimizer: str) -> None:
    run = Run(one_of_each(plan="hand"), optimizer)
    clipped = {"learning_rate": LR, "eps": EPS, "gradient_clipping": True, "max_gradient": 0.05}
    exact = Exact(run, compare(run, fused_params=OPTIMIZERS[optimizer] | clipped), max_gradient=0.05)
    for table in run.tables:
        exact.assert_close(table)


class UnderAutocast(nn.Module):
    """The embeddings, then dense layers that compute in bf16."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        torch.manual_seed(3)
        self.over = nn.Sequential(nn.Linear(DIM * len(model.names), 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = self.over(self.model(features))
        assert out.dtype == torch.bfloat16
        return out.float()


def autocast(rank: int, world_size: int) -> Values:
    configs = tables()
    model = shard(configs, placements(configs, MIXED), values=unsharded(configs), wrap=UnderAutocast)
    before = weights_of(model)
    dense = torch.optim.SGD(dict(in_backward_optimizer_filter(model.named_parameters())).values(), lr=0.1)
    outputs = []
    for step in range(4):
        dense.zero_grad()
        out = model(batch_of(configs, step, rank, world_size))
        out.square().mean().backward()
        dense.step()
        outputs.append(out)
    moved = weights_of(model)
    for name, value in before.items():
        assert name.endswith("fingerprint") or not torch.equal(moved[name], value), f"{name} has not been trained"
    return of_model("autocast", model, outputs)


def test_dense_layers_in_bf16_under_autocast() -> None:
    on_poison_as_on_gloo(autocast, 2)


def devices_of_nothing() -> AbstractContextManager[Any]:
    """Torch says that a sharded tensor of which a rank stores nothing is on a GPU, unless its group is gloo."""
    return patch.object(torch.cuda, "current_device", return_value="cpu")


def through_a_checkpoint(rank: int, world_size: int, folder: Path, shardings: tuple[str, ...]) -> Values:
    """Training that goes on from a checkpoint, with the values and the state of training that was not interrupted."""
    values: Values = {}
    for sharding in shardings:
        checkpoint = folder / f"{dist.get_backend()}_{sharding}"
        model = shard(tables(), sharding, values=unsharded(tables()))
        train(model, tables(), range(2))
        with devices_of_nothing():
            dcp.save(contents(model), checkpoint_id=checkpoint)
        outputs = train(model, tables(), range(2, 4))
        loaded = shard(tables(), sharding, values=unsharded(tables(), seed=2))
        train(loaded, tables(), range(9, 10))
        with devices_of_nothing():
            dcp.load(contents(loaded), checkpoint_id=checkpoint)
        again = train(loaded, tables(), range(2, 4))
        assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True)), sharding
        expected, found = (of_model(sharding, m, again) | state_of(m) for m in (model, loaded))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (sharding, name)
        values |= {f"{sharding}, {name}": value for name, value in found.items()}
    return values


@pytest.mark.slow
def test_checkpoints(tmp_path: Path) -> None:
    on_poison_as_on_gloo(through_a_checkpoint, 2, tmp_path, BASIC_SHARDINGS)
    on_poison_as_on_gloo(through_a_checkpoint, 4, tmp_path, ("table_row_wise", "grid_shard"))
