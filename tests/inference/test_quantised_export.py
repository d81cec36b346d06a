"""Quantised collections in TorchScript, in exported programs and in packages of AOTInductor."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchrec.fx
from quantised_tables import features_of, float_collection, tables, values_of
from single_tables import collection_of
from small_collections import pooled_or_not
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.models.dlrm import DLRM

from torchrec_qr.inference import quantize_embeddings


class Pooled(nn.Module):
    """TorchScript needs the types of a model's input."""

    def __init__(self, sparse: nn.Module) -> None:
        super().__init__()
        self.sparse = sparse

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return self.sparse(features)


class Sequences(Pooled):
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        return self.sparse(features)


def scripted(module: nn.Module) -> Any:
    """TorchRec's way to TorchScript."""
    return torch.jit.script(torch.fx.GraphModule(module, torchrec.fx.Tracer().trace(module)))


@pytest.mark.parametrize("output", [torch.float32, torch.float16])
@pytest.mark.parametrize("is_weighted", [False, True])
@pooled_or_not
def test_torchscript_computes_the_same(pooled: bool, is_weighted: bool, output: torch.dtype, tmp_path: Any) -> None:
    module = quantize_embeddings(float_collection(pooled, pooled and is_weighted), torch.qint8, output_dtype=output)
    torch.jit.save(scripted((Pooled if pooled else Sequences)(module)), tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    for bags in (1, 6):
        features = features_of(module, bags=bags)
        assert torch.equal(values_of(loaded(features)), values_of(module(features)))


@pytest.mark.parametrize("strict", [False, True])
@pooled_or_not
def test_exported_programs_compute_the_same(pooled: bool, strict: bool) -> None:
    module = quantize_embeddings(float_collection(pooled, pooled), torch.qint8)

    class OfTensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse = module

        def forward(self, values: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
            out = self.sparse(
                KeyedJaggedTensor(
                    keys=keys, values=values, lengths=lengths.view(-1), weights=weights, stride=lengths.shape[1]
                )
            )
            return values_of(out)

    features = features_of(module)
    keys = features.keys()

    def arguments(features: KeyedJaggedTensor) -> tuple[Tensor, Tensor, Tensor]:
        return features.values(), features.lengths().view(len(keys), -1), features.weights()

    ids, bags = torch.export.Dim("ids"), torch.export.Dim("bags", min=2)
    exported = torch.export.export(
        OfTensors(), arguments(features), dynamic_shapes=({0: ids}, {1: bags}, {0: ids}), strict=strict
    ).module()
    for seed, count in ((1, 6), (2, 13)):
        other = features_of(module, seed, count)
        assert torch.equal(exported(*arguments(other)), OfTensors()(*arguments(other)))


@pytest.mark.slow
@pooled_or_not
def test_compiled_modules_are_one_graph(pooled: bool) -> None:
    torch._dynamo.reset()
    module = quantize_embeddings(float_collection(pooled), torch.qint8)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for seed, bags in ((0, 6), (1, 7)):
        features = features_of(module, seed, bags)
        assert torch.equal(values_of(compiled(features)), values_of(module(features)))


@pytest.mark.slow
def test_a_package_of_aotinductor_scores_as_the_model(tmp_path: Path) -> None:
    """A whole DLRM of all kinds of tables in 8 bits, at each number of rows from 2 to 64."""
    configs = tables(True)
    configs[1].feature_names = ["f_strided_mult"]  # TorchRec's DLRM has no tables that share a feature
    collection = collection_of(configs)
    model = DLRM(collection, dense_in_features=4, dense_arch_layer_sizes=[8, 16], over_arch_layer_sizes=[8, 1])
    model = quantize_embeddings(model, torch.qint8)
    keys = features_of(collection).keys()

    class OfTensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, dense: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
            return self.model(dense, KeyedJaggedTensor(keys, ids, lengths=lengths.flatten()))

    def arguments(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        features = features_of(collection, seed=rows, bags=rows)
        dense = torch.rand(rows, 4, generator=torch.Generator().manual_seed(rows))
        return dense, features.values(), features.lengths().view(len(keys), rows)

    whole, dynamic = OfTensors().eval(), torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(whole, arguments(3), dynamic_shapes=({0: dynamic}, {0: dynamic}, {1: dynamic}))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        scores = torch._inductor.aoti_load_package(package)
        for rows in range(2, 65):
            torch.testing.assert_close(scores(*arguments(rows)), whole(*arguments(rows)), rtol=1e-6, atol=1e-6)
