"""TorchRec's pipelines read nothing before it has arrived, and give the outputs of a plain loop.

On a CPU they have no streams (`host_streams`): shown is who waits for which collective, not the order of streams.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_streams import host_streams
from poison_jobs import Values, by_step, on_poison_as_on_gloo
from sharded_model import tables, weights_of
from test_pipelines import CPU, batches, drain, from_host, mixed_model, step, until_its_end
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import (
    EvalPipelineSparseDist,
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSemiSync

from torchrec_qr.distributed.embeddingbag import ShardedCompositionalEmbeddingBagCollection


def trained(train: Callable[[nn.Module, Any], list[Tensor]], what: str, *model_arguments: Any) -> Values:
    model, optimizer = mixed_model(*model_arguments)
    outputs = train(model, optimizer)
    return by_step(what, outputs) | {f"{what}, {name}": value for name, value in weights_of(model).items()}


def in_step(rank: int, world_size: int, weighted: bool) -> Values:
    """A plain loop, the pipelines that compute the same, and an evaluation by a pipeline."""
    data = batches(rank, world_size, weighted)

    def pipeline(kind: Callable[..., Any]) -> Callable[[nn.Module, Any], list[Tensor]]:
        def train(model: nn.Module, optimizer: Any) -> list[Tensor]:
            made = kind(model, optimizer, CPU)
            with host_streams(made):
                outputs = drain(made.progress, data)
            assert len(made._pipelined_modules) == 1, "the collection has not been pipelined"
            made.detach()
            model.eval()
            with torch.no_grad():
                return outputs + until_its_end(EvalPipelineSparseDist(model, optimizer, CPU), from_host(data[:3]))

        return train

    def loop(model: nn.Module, optimizer: Any) -> list[Tensor]:
        outputs = [step(model, optimizer, batch) for batch in data]
        model.eval()
        with torch.no_grad():
            return outputs + [model(batch)[1] for batch in data[:3]]

    return (
        trained(loop, "loop", weighted)
        | trained(pipeline(TrainPipelineSparseDist), "sparse dist", weighted)
        | trained(pipeline(PrefetchTrainPipelineSparseDist), "prefetch", weighted)
        # Synchronous up to a batch that is not reached.
        | trained(pipeline(TrainPipelineSemiSync), "semi-synchronous", weighted)
    )


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_pipelines_give_the_outputs_of_a_plain_loop(weighted: bool) -> None:
    for values in on_poison_as_on_gloo(in_step, 2, weighted):
        of_loop = {name.removeprefix("loop, "): v for name, v in values.items() if name.startswith("loop, ")}
        for kind in ("sparse dist", "prefetch", "semi-synchronous"):
            for name, value in of_loop.items():
                assert torch.equal(values[f"{kind}, {name}"], value), (kind, name)


def a_step_behind(rank: int, world_size: int) -> Values:
    """The semi-synchronous pipeline, and by hand what it is: a batch is looked up before the last one's backward."""
    data = batches(rank, world_size, weighted=False)
    # Leave the plain table out, because its CPU kernel refuses the backward of a lookup from before its last step.
    configs = tables()[:-1]

    def pipeline(model: nn.Module, optimizer: Any) -> list[Tensor]:
        made = TrainPipelineSemiSync(model, optimizer, CPU, start_batch=0)
        with host_streams(made):
            return drain(made.progress, data)

    def by_hand(model: nn.Module, optimizer: Any) -> list[Tensor]:
        (collection,) = (m for m in model.modules() if isinstance(m, ShardedCompositionalEmbeddingBagCollection))
        look_up = collection.forward
        outputs = []
        ahead = look_up(data[0].features)
        for i, batch in enumerate(data):
            collection.forward = lambda *_, now=ahead: now
            loss, out = model(batch)
            if i + 1 < len(data):
                ahead = look_up(data[i + 1].features)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(out)
        return outputs

    return trained(pipeline, "pipeline", False, configs) | trained(by_hand, "by hand", False, configs)


def test_the_semi_synchronous_pipeline_looks_up_a_step_ahead() -> None:
    for values in on_poison_as_on_gloo(a_step_behind, 2):
        expected = {name: v for name, v in values.items() if name.startswith("by hand")}
        assert expected
        for name, value in expected.items():
            assert torch.equal(values[name.replace("by hand", "pipeline")], value), name
