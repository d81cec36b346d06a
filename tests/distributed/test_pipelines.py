"""TorchRec's pipelines, quantised communication, and what a batch may carry, around sharded compositional tables."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from assert_all_close import assert_all_close
from global_batches import BAGS, batch_of
from placements import placements
from ranks import own_device, run_ranks
from sharded_model import DIM, shard, tables, train, unsharded, weights_of
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.fbgemm_qcomm_codec import (
    CommType,
    QCommsConfig,
    get_qcomm_codecs,
    get_qcomm_codecs_registry,
)
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist, TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import CommOp
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.streamable import Pipelineable

STEPS = 6
CPU = torch.device("cpu")
# Every sharding type of two ranks within one collection.
_TYPES = {"t": "table_wise", "c": "column_wise", "r": "row_wise", "d": "data_parallel"}
MIXED = {t.name: _TYPES[letter] for t, letter in zip(tables(), "tcrtcrdtr", strict=True)}


@dataclass
class Batch(Pipelineable):
    features: KeyedJaggedTensor
    labels: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(self.features.to(device, non_blocking), self.labels.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        self.features.record_stream(stream)
        self.labels.record_stream(stream)

    def pin_memory(self) -> "Batch":
        return self


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        out = self.model(batch.features)
        return ((out.mean(dim=1) - batch.labels) ** 2).mean(), out


def batches(rank: int, world_size: int, weighted: bool) -> list[Batch]:
    return [
        Batch(features, torch.arange(features.stride(), device=own_device()) / BAGS)
        for features in (batch_of(tables(), step, rank, world_size, weighted) for step in range(STEPS))
    ]


def mixed_model(
    weighted: bool, configs: list[EmbeddingBagConfig] | None = None
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    configs = tables() if configs is None else configs
    model = shard(
        configs,
        placements(configs, MIXED),
        values=unsharded(configs, is_weighted=weighted),
        is_weighted=weighted,
        wrap=WithLoss,
    )
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())), lambda ps: torch.optim.SGD(ps, lr=0.1)
    )
    return model, CombinedOptimizer([model.fused_optimizer, dense])


def step(model: nn.Module, optimizer: CombinedOptimizer, batch: Batch) -> Tensor:
    optimizer.zero_grad()
    loss, out = model(batch)
    loss.backward()
    optimizer.step()
    return out.detach()


def drain(progress: Callable[[Iterator[Batch]], Any], data: list[Batch]) -> list[Tensor]:
    it = from_host(data)
    return [progress(it).detach() for _ in data]


def from_host(data: list[Batch]) -> Iterator[Batch]:
    """Batches on the host, which a pipeline brings to the device."""
    return (batch.to(CPU) for batch in data)


def assert_all_equal(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert [torch.equal(a, e) for a, e in zip(actual, expected, strict=True)] == [True] * len(expected), what


def compare_pipelines(rank: int, world_size: int, weighted: bool) -> None:
    data = batches(rank, world_size, weighted)
    plain, optimizer = mixed_model(weighted)
    expected = [step(plain, optimizer, batch) for batch in data]
    weights = weights_of(plain)
    assert not torch.equal(expected[0], plain(data[0])[1]), "training has moved nothing"

    for pipeline_type in (TrainPipelineBase, TrainPipelineSparseDist):
        model, optimizer = mixed_model(weighted)
        pipeline = pipeline_type(model, optimizer, own_device())
        assert_all_equal(drain(pipeline.progress, data), expected, pipeline_type.__name__)
        assert_all_close(weights_of(model), weights, pipeline_type.__name__)
        if pipeline_type is TrainPipelineSparseDist:
            assert len(pipeline._pipelined_modules) == 1, "the collection has not been pipelined"

    # Detached halfway, the model trains on without the pipeline.
    model, optimizer = mixed_model(weighted)
    pipeline = TrainPipelineSparseDist(model, optimizer, own_device())
    outputs = drain(pipeline.progress, data[: STEPS // 2])
    detached = pipeline.detach()
    outputs += [step(detached, optimizer, batch) for batch in data[STEPS // 2 :]]
    assert_all_equal(outputs, expected, "detach")

    # Detached, evaluated while two batches wait in the pipeline, and attached again.
    model, optimizer = mixed_model(weighted)
    pipeline = TrainPipelineSparseDist(model, optimizer, own_device())
    it = from_host(data)
    outputs = [pipeline.progress(it).detach() for _ in range(2)]
    detached = pipeline.detach().eval()
    plain, optimizer = mixed_model(weighted)
    for batch in data[:2]:
        step(plain, optimizer, batch)
    assert_all_equal([detached(data[-1])[1]], [plain.eval()(data[-1])[1]], "evaluated while detached")
    pipeline.attach(detached.train())
    outputs += [pipeline.progress(it).detach() for _ in range(STEPS - 2)]
    assert_all_equal(outputs, expected, "detach, evaluate, attach")
    assert_all_close(weights_of(model), weights, "detach, evaluate, attach")
    pipeline.detach()

    with torch.no_grad():
        model.eval()
        expected = [model(batch)[1] for batch in data]
        evaluation = EvalPipelineSparseDist(model, optimizer, own_device())
        assert_all_equal(until_its_end(evaluation, from_host(data)), expected, "EvalPipelineSparseDist")


def until_its_end(pipeline: Any, data: Iterator[Any]) -> list[Tensor]:
    """Until the pipeline ends, as a loop over it would."""
    outputs = []
    while True:
        try:
            outputs.append(pipeline.progress(data))
        except StopIteration:
            return outputs


@pytest.mark.parametrize("weighted", [False, True])
def test_pipelines_give_the_outputs_of_a_plain_loop(weighted: bool) -> None:
    run_ranks(compare_pipelines, 2, weighted)


# What TorchRec's codecs of half precision do to a value, and how far three steps with them may lead.
QUANTISED = {"fp16": (torch.float16, CommType.FP16, 2e-3), "bf16": (torch.bfloat16, CommType.BF16, 2e-2)}


def codecs_of(precision: CommType) -> dict[str, Any]:
    """By operation. TorchRec's registry replaces bf16 by fp16 on a CPU; the codecs themselves work there."""
    config = QCommsConfig(forward_precision=precision, backward_precision=precision)
    operations = (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER)
    return {operation.name: get_qcomm_codecs(config) for operation in operations}


def quantised_communication(rank: int, world_size: int, shardings: tuple[str, ...], codec: str) -> None:
    dtype, precision, tolerance = QUANTISED[codec]
    configs = tables()
    for sharding in shardings:
        exact = shard(configs, sharding, values=unsharded(configs))
        rounded = shard(configs, sharding, values=unsharded(configs), codecs=codecs_of(precision))
        expected, actual = train(exact, configs, range(3)), train(rounded, configs, range(3))
        first, of_first = (
            dict(zip((c.name for c in configs), out[0].split(DIM, dim=1), strict=True)) for out in (expected, actual)
        )
        for config in configs:
            # `placement` has path split by rows where others are by columns; MEAN divides after the communication.
            whole_bags = sharding == "table_wise" or (sharding == "column_wise" and config.name != "explicit_path")
            if whole_bags and config.pooling == PoolingType.SUM:
                value = first[config.name]
                assert torch.equal(of_first[config.name], value.to(dtype).float()), f"{sharding}, {config.name}"
                assert not torch.equal(of_first[config.name], value), f"{sharding}, {config.name}: not quantised"
        for a, e in zip(actual, expected, strict=True):
            scale = float(e.abs().max())
            torch.testing.assert_close(
                a, e, rtol=tolerance, atol=tolerance * scale, msg=lambda m, s=sharding: f"{s}, {codec}: {m}"
            )
        assert_all_close(weights_of(rounded), weights_of(exact), sharding, 5 * tolerance, 5 * tolerance)


@pytest.mark.parametrize("codec", QUANTISED)
def test_quantised_communication(codec: str) -> None:
    run_ranks(quantised_communication, 2, ("table_wise", "column_wise", "row_wise"), codec)
    run_ranks(quantised_communication, 4, ("table_row_wise", "grid_shard"), codec, local_world_size=2)


def by_the_registry(rank: int, world_size: int) -> None:
    """As users pass codecs: by operation, of the registry that TorchRec makes for the device."""
    config = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.FP16)
    codecs = get_qcomm_codecs_registry(config, device=CPU)
    models = [
        shard(tables(), "table_wise", values=unsharded(tables()), codecs=registry)
        for registry in (codecs, codecs_of(CommType.FP16))
    ]
    outputs = [train(model, tables(), range(2)) for model in models]
    assert_all_equal(outputs[0], outputs[1], "registry")


def test_codecs_of_torchrecs_registry() -> None:
    run_ranks(by_the_registry, 2)
