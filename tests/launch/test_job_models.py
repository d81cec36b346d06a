"""The models on sharded embeddings, their losses, and the metrics of all ranks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torchmetrics.functional.classification import binary_auroc
from torchrec import KeyedJaggedTensor
from torchrec.models.deepfm import SimpleDeepFMNN

from benchmarks.quality.feature_generation import FeatureGenerationEmbeddingBagCollection
from launch.config import Job
from launch.data.batch import Batch
from launch.metrics import Predictions, quality
from launch.model import DCN, DeepFM, build_model
from launch.parallel import parallelize
from launch.schedule import Schedule
from launch.sections import ScheduleSection
from launch.task import NonFiniteLossError, TrainTask
from torchrec_qr import CompositionalEmbeddingBagCollection
from torchrec_qr.cli.schema import build_tables, load

CPU = torch.device("cpu")
INTERACTIONS: dict[str, dict[str, Any]] = {
    "dot": {"bottom_mlp": [8, 4]},
    "dcn_v2": {"bottom_mlp": [8, 4], "cross_layers": 2, "cross_rank": 3},
    "projection": {"bottom_mlp": [8, 4], "projection_mlp": [8, 8]},
    "dcn": {"cross_layers": 2},
    "deepfm": {"top_mlp": [8, 6]},
}


def job(interaction: str, **train: Any) -> Job:
    table = {"embedding_dim": 4, "num_embeddings": 30}
    compressed = {**table, "partitions": {"kind": "quotient_remainder", "num_collisions": 5}}
    model = {"top_mlp": [8, 6], "dense_in_features": 3, **INTERACTIONS[interaction]}
    rule = {"name": "sgd", "lr": 0.5}
    sections = {
        "tables": [{"name": "a", **compressed}, {"name": "b", **table}, {"name": "c", **compressed}],
        "data": {"features": ["a", "b", "c"], "dense_features": 3},
        "model": {**model, "interaction": interaction, "embedding_dim": 4},
        "optimizer": {"sparse": rule, "dense": rule},
        "train": {"batch_size": 4, **train},
    }
    return load(Job, sections)


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 2, 0, 1, 1, 1, 1, 1, 3, 0, 1, 1])
    ids = torch.randint(30, (int(lengths.sum()),), generator=generator)
    sparse = KeyedJaggedTensor(["a", "b", "c"], ids, lengths=lengths)
    dense = torch.randn(4, 3, generator=generator)
    return Batch(dense, sparse, torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0]))


def train_two_steps(rank: int, world_size: int) -> None:
    for interaction in INTERACTIONS:
        for collection in (CompositionalEmbeddingBagCollection, FeatureGenerationEmbeddingBagCollection):
            this = job(interaction, grad_clip=0.01)
            torch.manual_seed(0)
            tables = build_tables(this.tables, ".")
            task = TrainTask(build_model(this.model, tables, CPU, collection), CPU)
            parallel = parallelize(task, this, CPU)
            model, optimizer = parallel.model, parallel.optimizer
            layers = {n: p for n, p in model.named_parameters() if "embedding_bags" not in n}
            for step in range(2):
                before = {name: p.detach().clone() for name, p in layers.items()}
                optimizer.zero_grad()
                loss, _ = model(batch(10 * step + rank))
                loss.backward()
                optimizer.step()
                moved = math.sqrt(sum(float((p.detach() - before[n]).square().sum()) for n, p in layers.items()))
                assert 0 < moved <= 0.5 * 0.01 * (1 + 1e-4), (interaction, collection, step, moved)  # rate times norm
            for name, p in layers.items():  # the same on all ranks
                others = [torch.empty_like(p) for _ in range(world_size)]
                dist.all_gather(others, p.detach().contiguous())
                assert all(torch.equal(p, other) for other in others), name


def test_every_model_trains_on_two_ranks_with_clipped_layers() -> None:
    run_ranks(train_two_steps, 2)


def collection() -> CompositionalEmbeddingBagCollection:
    return CompositionalEmbeddingBagCollection(tables=build_tables(job("dcn").tables))


def test_dcn_is_its_formula() -> None:
    embeddings = collection()
    model = DCN(embeddings, dense_in_features=3, cross_layers=2, deep_layer_sizes=[8, 6]).double()
    rows = batch(0)
    x0 = torch.cat([rows.dense.double(), embeddings(rows.sparse).values().double()], dim=1)
    x = x0
    for layer in range(2):
        w, b = model.cross.kernels[layer].view(-1), model.cross.bias[layer].view(-1)
        x = x0 * (x @ w)[:, None] + b + x
    deep = x0
    for layer in model.deep._mlp:
        deep = torch.relu(deep @ layer._linear.weight.T + layer._linear.bias)
    expected = torch.cat([x, deep], dim=1) @ model.logit.weight.T + model.logit.bias
    torch.testing.assert_close(model(rows.dense.double(), rows.sparse), expected)


def test_deepfm_gives_the_logits_of_torchrecs_probabilities() -> None:
    torch.manual_seed(1)
    stock = SimpleDeepFMNN(3, collection(), 8, 6)  # type: ignore[arg-type]
    torch.manual_seed(1)
    ours = DeepFM(collection(), 3, 8, 6)
    ours.deepfm.load_state_dict(stock.state_dict())
    rows = batch(0)
    torch.testing.assert_close(ours(rows.dense, rows.sparse).sigmoid(), stock(rows.dense, rows.sparse))


class FixedLogits(nn.Module):
    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits)[:, None])

    def forward(self, dense: torch.Tensor, sparse: KeyedJaggedTensor) -> torch.Tensor:
        return self.logits


def test_rows_of_weight_0_have_no_part_in_the_loss() -> None:
    task = TrainTask(FixedLogits([2.0, -1.0, 0.0, 50.0]), CPU)
    loss, (logits, labels, weights) = task(batch(0))
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log(2)) / 4
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    gradient = task.model.logits.grad.flatten()  # type: ignore[union-attr]
    assert gradient.tolist() == pytest.approx([-0.25 / (1 + math.exp(2)), 0.25 / (1 + math.e), 0.125, 0.0])
    assert (logits[3], labels[3], weights[3]) == (50.0, 1.0, 0.0)


def test_the_cause_of_a_loss_that_is_no_number() -> None:
    task = TrainTask(FixedLogits([math.nan, 0.0, 0.0, 0.0]), CPU)
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan; not finite on this rank: logits"):
        task(batch(0))
    rows = batch(0)
    rows.dense[2, 1] = math.inf
    with pytest.raises(NonFiniteLossError, match=r"1 rows of the batch have dense features .*, the first is 2"):
        task(rows)
    task.checks_loss = False
    assert math.isnan(task(batch(0))[0].item())


def gather_predictions(rank: int, world_size: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    predictions = Predictions()
    everything = []
    for r in range(world_size):
        generator = torch.Generator().manual_seed(r)
        for size in range(r + 1):  # the second rank has more, and the first batch of each is empty
            logits = torch.randn(size * 40, generator=generator)
            labels = (torch.rand(size * 40, generator=generator) < logits.sigmoid()).float()
            weights = (torch.rand(size * 40, generator=generator) < 0.8).float()
            if r == rank:
                predictions.add(logits, labels, weights)
                if size == 1:  # as a job that is resumed
                    predictions = Predictions(*predictions.state())
            everything.append(torch.stack([logits, labels])[:, weights > 0])
    logits, labels = torch.cat(everything, dim=1)
    q = quality(*predictions.gather(CPU))
    assert q == quality(logits, labels)
    x, y = logits.double().numpy(), labels.numpy()
    p = 1 / (1 + np.exp(-x))
    logloss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    base = -(y.mean() * np.log(y.mean()) + (1 - y.mean()) * np.log(1 - y.mean()))
    assert q.samples == len(y)
    assert q.logloss == pytest.approx(logloss)
    assert q.ne == pytest.approx(logloss / base)
    assert q.auc == pytest.approx(binary_auroc(logits.double().sigmoid(), labels.long()).item(), abs=1e-6)
    assert q.calibration == pytest.approx(p.mean() / y.mean())


def test_metrics_are_those_of_one_process_with_all_predictions() -> None:
    run_ranks(gather_predictions, 3)


def test_adding_predictions_waits_for_no_device() -> None:
    row = torch.empty(4, device="meta")  # on which whatever the host would wait for raises
    Predictions().add(row, row, row)


def test_metrics_of_labels_that_all_agree() -> None:
    q = quality(torch.tensor([1.0, 2.0]), torch.ones(2))
    assert math.isnan(q.auc)
    assert math.isnan(q.ne)
    assert not q.is_guessing


def test_a_schedule_sets_every_group_from_its_own_rate() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([p], lr=lr) for p, lr in zip(parameters, (1.0, 10.0), strict=True)]
    schedule = Schedule(ScheduleSection("cosine", warmup_steps=2, decay_start=2, decay_steps=4), optimizers)
    seen = []
    for step in range(7):
        schedule.set(step)
        seen.append([o.param_groups[0]["lr"] for o in optimizers])
    halves = [0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2, 0.0]
    assert seen == [pytest.approx([x, 10 * x]) for x in halves]
