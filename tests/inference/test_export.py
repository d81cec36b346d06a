"""Unsharded collections through ``torch.export``, ``torch.compile`` and TorchScript compute the same as before."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchrec.fx
from batches import batch
from exported_models import KEYS, S, inputs, model, tables
from kinds import kind_of
from small_collections import pooled_or_not
from torch import nn
from torch.export import Dim
from torchrec import KeyedJaggedTensor

from torchrec_qr import CompositionalEmbeddingBagConfig, CompositionalEmbeddingConfig
from torchrec_qr.inference import quantize_embeddings

OUTSIDE = r"table 'mult', feature 'g': id 100 is outside \[0, 100\)"


def exported(module: nn.Module, strict: bool, weighted: bool = False) -> torch.export.ExportedProgram:
    of_ids = {0: Dim.DYNAMIC}
    shapes = (of_ids, {1: Dim.DYNAMIC}, of_ids) if weighted else (of_ids, {1: Dim.DYNAMIC})
    with torch.no_grad():
        return torch.export.export(module, inputs(5, weighted), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_exported_bags_agree(weighted: bool, strict: bool) -> None:
    module = model(True, weighted)
    program = exported(module, strict, weighted)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "torchrec_qr_serving.pooled.default" in operators
    assert not [name for name in operators if name.startswith(("fbgemm", "torchrec_qr."))]
    made = program.module()
    for bags in (1, 2, 5, 8, 64):
        given = inputs(bags, weighted)
        torch.testing.assert_close(made(*given), module(*given), rtol=1e-5, atol=1e-6)
    keys = module.state_dict().keys()
    assert {"collection.embedding_bags.mult.partition_0.weight", "collection.embedding_bags.plain.weight"} <= keys
    assert set(program.state_dict) == set(keys)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("need_indices", [False, True])
def test_exported_sequences_agree(need_indices: bool, strict: bool) -> None:
    module = model(False, need_indices=need_indices)
    made = exported(module, strict).module()
    for bags in (2, 5, 8, 64):
        given = inputs(bags)
        torch.testing.assert_close(made(*given), module(*given), rtol=1e-5, atol=1e-6)


def test_a_loaded_program_agrees() -> None:
    module = model(True)
    file = io.BytesIO()
    torch.export.save(exported(module, False), file)
    file.seek(0)
    given = inputs(9)
    torch.testing.assert_close(torch.export.load(file).module()(*given), module(*given), rtol=1e-5, atol=1e-6)


@pooled_or_not
def test_policies_hold_in_an_exported_program(pooled: bool) -> None:
    alone = [t for t in tables(pooled) if getattr(t, "id_policy", "error") != "error"]
    assert "hashed" in [t.name for t in alone]
    module = model(pooled, need_indices=True, given=alone)
    made = exported(module, False).module()
    ids, lengths = inputs(6)
    ids = ids * 7 - 300
    torch.testing.assert_close(made(ids, lengths), module(ids, lengths), rtol=1e-5, atol=1e-6)


@pooled_or_not
def test_an_id_outside_is_an_error_of_the_program(pooled: bool) -> None:
    module = model(pooled)
    made = exported(module, False).module()
    ids, lengths = torch.tensor([1, S, 2]), torch.tensor([[1, 1], [0, 0], [1, 0], [0, 0]])
    for run, error in ((module, IndexError), (made, RuntimeError)):
        with pytest.raises(error, match=OUTSIDE):
            run(ids, lengths)


@pooled_or_not
def test_path_is_refused_by_name(pooled: bool) -> None:
    config = CompositionalEmbeddingBagConfig if pooled else CompositionalEmbeddingConfig
    table = config(
        name="t",
        feature_names=["f"],
        num_embeddings=S,
        embedding_dim=8,
        partitions=kind_of("strided", 2).partitions,
        operation="path",
    )
    module = model(pooled, given=[table])
    message = "table 't': operation 'path' with partitions of"
    with pytest.raises(NotImplementedError, match=message):
        exported(module, False)
    scripted = torch.jit.script(module.collection)
    with pytest.raises(torch.jit.Error, match=message):
        scripted(batch({"f": [[1]]}))


def test_another_number_of_bags_per_feature_is_refused_by_name() -> None:
    module = model(True)

    class Varying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.collection = module.collection

        def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            strides = torch.IntTensor([[1], [2], [1], [1]])
            kjt = KeyedJaggedTensor(list(KEYS), ids, lengths=lengths, stride_per_key_per_rank=strides)
            return self.collection(kjt).values()

    with pytest.raises(NotImplementedError, match="one number of bags for all"):
        torch.export.export(Varying(), (torch.tensor([1]), torch.tensor([1, 0, 0, 0, 0])), strict=False)


def scripted(module: nn.Module) -> Any:
    return torch.jit.script(module)


def traced_and_scripted(module: nn.Module) -> Any:
    return torch.jit.script(torchrec.fx.symbolic_trace(module))


@pytest.mark.parametrize("make", [scripted, traced_and_scripted])
@pytest.mark.parametrize("weighted", [False, True])
def test_scripted_bags_agree(make: Callable[[nn.Module], Any], weighted: bool) -> None:
    collection = model(True, weighted).collection
    file = io.BytesIO()
    torch.jit.save(make(collection), file)
    file.seek(0)
    made = torch.jit.load(file)
    for bags in (1, 6):
        kjt = kjt_of(*inputs(bags, weighted))
        out, expected = made(kjt), collection(kjt)
        assert out.keys() == expected.keys()
        torch.testing.assert_close(out.values(), expected.values(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out["g@plain"], expected["g@plain"], rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=OUTSIDE):
        made(kjt_of(torch.tensor([S]), torch.tensor([[1], [0], [0], [0]]), torch.ones(1) if weighted else None))


@pytest.mark.parametrize("make", [scripted, traced_and_scripted])
def test_scripted_sequences_agree(make: Callable[[nn.Module], Any]) -> None:
    collection = model(False, need_indices=True).collection
    made = make(collection)
    kjt = kjt_of(*inputs(6))
    out, expected = made(kjt), collection(kjt)
    assert out.keys() == expected.keys()
    for name, found in expected.items():
        torch.testing.assert_close(out[name].values(), found.values(), rtol=1e-5, atol=1e-6)
        assert torch.equal(out[name].lengths(), found.lengths())
        assert torch.equal(out[name].weights(), found.weights())


def kjt_of(ids: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None = None) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=list(KEYS), values=ids, lengths=lengths.reshape(-1), weights=weights)


@pooled_or_not
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint4x2])
def test_quantised_collections_are_exported_and_scripted(pooled: bool, dtype: torch.dtype) -> None:
    module = quantize_embeddings(model(pooled), dtype)
    given = inputs(7)
    for strict in (False, True):
        made = exported(module, strict).module()
        for bags in (2, 8):
            own = inputs(bags)
            torch.testing.assert_close(made(*own), module(*own), rtol=1e-5, atol=1e-6)
    scripted_collection = traced_and_scripted(module.collection)
    out, expected = scripted_collection(kjt_of(*given)), module.collection(kjt_of(*given))
    if pooled:
        torch.testing.assert_close(out.values(), expected.values(), rtol=1e-5, atol=1e-6)
    else:
        for name, found in expected.items():
            torch.testing.assert_close(out[name].values(), found.values(), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=OUTSIDE):
        made(torch.tensor([1, S, 2]), torch.tensor([[1, 1], [0, 0], [1, 0], [0, 0]]))


def test_rows_of_another_type_are_exported_as_such() -> None:
    """The type of rows is that of the parameters, and not the one with which the collection was made."""
    module = model(True).to(torch.bfloat16)
    given = inputs(5)
    torch.testing.assert_close(exported(module, False).module()(*given), module(*given), rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"table 'mult': rows of \['torch.float64'\]; allowed"):
        exported(model(True).double(), False)


@pytest.mark.slow
def test_a_compiled_collection_trains_with_weights_of_ids() -> None:
    """The output of a compiled collection has gradients, also of the weights of ids."""
    torch._dynamo.reset()
    collection = model(True, weighted=True).collection
    compiled = torch.compile(collection, backend="aot_eager", fullgraph=True)
    for bags in (3, 6):
        ids, lengths, weights = inputs(bags, weighted=True)
        found = []
        for run in (collection, compiled):
            own = weights.clone().requires_grad_()
            out = run(kjt_of(ids, lengths, own)).values()
            total = (out * torch.arange(1, out.numel() + 1).view(out.shape)).sum()
            found.append([out, *torch.autograd.grad(total, [own, *collection.parameters()])])
        torch.testing.assert_close(found[1], found[0])
    with pytest.raises(IndexError, match=OUTSIDE):
        compiled(kjt_of(torch.tensor([1, S]), torch.tensor([[1, 1], [0, 0], [0, 0], [0, 0]]), torch.ones(2)))


@pytest.mark.slow
def test_a_compiled_collection_without_pooling_trains() -> None:
    torch._dynamo.reset()
    module = model(False)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for bags in (3, 6):
        given = inputs(bags)
        found = []
        for run in (module, compiled):
            outs = run(*given)
            total = sum((o * torch.arange(1, o.numel() + 1).view(o.shape)).sum() for o in outs if o.is_floating_point())
            found.append([*outs, *torch.autograd.grad(total, list(module.parameters()))])
        torch.testing.assert_close(found[1], found[0])
