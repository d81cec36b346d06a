"""`torch.fx`, TorchRec's tracer and `torch.compile` go through the lookup, and what they make computes the same."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torchrec.fx
from batches import batch
from single_tables import bag_table
from small_collections import (
    BATCH,
    OPERATIONS,
    OTHER_BATCH,
    assert_equal,
    collection,
    each_kind,
    each_operation,
    gradients,
    outputs,
    partitions_of,
    pooled_or_not,
)
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import PoolingType

from torchrec_qr import CompositionalEmbeddingBagCollection
from torchrec_qr.ops.backends import cpu
from torchrec_qr.ops.cpu_library import without_kernels


def traced_by_torch(module: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(module)


def traced_by_torchrec(module: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.GraphModule(module, torchrec.fx.Tracer().trace(module))


class Model(nn.Module):
    """A collection inside of a model, as tracers meet it."""

    def __init__(self, sparse: nn.Module) -> None:
        super().__init__()
        self.sparse = sparse

    def forward(self, features: KeyedJaggedTensor) -> Any:
        return self.sparse(features)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "pytorch"])
@pytest.mark.parametrize("trace", [traced_by_torch, traced_by_torchrec])
@each_operation
@each_kind
@pooled_or_not
def test_tracers_record_the_lookup_as_one_call(
    pooled: bool, kind: str, operation: str, trace: Callable[[nn.Module], torch.fx.GraphModule], kernels: bool
) -> None:
    """There is one call for all tables. The device decides the backend later."""
    if kernels and not cpu.available():
        pytest.skip("the CPU kernels are not built")
    with nullcontext() if kernels else without_kernels():
        calls = _traced_computes_the_same(pooled, kind, operation, trace)
    assert calls.count("pooled_in_graph" if pooled else "sequences_in_graph") == 1
    assert not {"embedding", "embedding_bag", "index_select", "mul", "cat"} & set(calls)


def _traced_computes_the_same(
    pooled: bool, kind: str, operation: str, trace: Callable[[nn.Module], torch.fx.GraphModule]
) -> list[str]:
    """Checks it, and returns the names of the functions that the graph calls."""
    module = Model(collection(partitions_of(kind), pooled, **OPERATIONS[operation]))
    traced = trace(module)
    assert not [n for n in traced.graph.nodes if n.op == "call_module"]
    for per_feature in (BATCH, OTHER_BATCH, {"f": [[]], "g": [[]]}):
        results, eager = outputs(traced, per_feature), outputs(module, per_feature)
        assert_equal(results, eager)
        assert_equal(gradients(module, results), gradients(module, eager))
    with pytest.raises(IndexError, match="id 100 is outside"):
        outputs(traced, {"f": [[100]], "g": [[]]})
    return [n.target.__name__ for n in traced.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("trace", [traced_by_torch, traced_by_torchrec])
def test_a_traced_collection_weights_and_divides(trace: Callable[[nn.Module], torch.fx.GraphModule]) -> None:
    table = bag_table(partitions_of("strided"), feature_names=["f", "g"], pooling=PoolingType.MEAN)
    ebc = CompositionalEmbeddingBagCollection(tables=[table], is_weighted=True)
    traced = trace(ebc)
    for per_feature in (BATCH, OTHER_BATCH):
        n = sum(len(bag) for bags in per_feature.values() for bag in bags)
        kjt = batch(per_feature, torch.arange(1.0, n + 1))
        assert torch.equal(traced(kjt).values(), ebc(kjt).values())


@pytest.mark.parametrize(
    ("pooled", "kind", "operation", "batches"),
    [
        (True, "strided", "mult", [BATCH]),
        pytest.param(True, "explicit", "concat", [BATCH], marks=pytest.mark.slow),
        pytest.param(True, "strided", "path_hidden", [{"f": [[0, 5], [5]], "g": [[1], [2]]}], marks=pytest.mark.slow),
        (False, "strided", "add", [BATCH, OTHER_BATCH]),
    ],
)
def test_compiled_modules_agree(pooled: bool, kind: str, operation: str, batches: list[dict[str, Any]]) -> None:
    torch._dynamo.reset()
    module = collection(partitions_of(kind), pooled, **OPERATIONS[operation])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for per_feature in batches:
        results, eager = outputs(compiled, per_feature), outputs(module, per_feature)
        torch.testing.assert_close(results, eager)
        torch.testing.assert_close(gradients(module, results), gradients(module, eager))
    with pytest.raises(IndexError, match=r"table 't', feature 'f': id 100 is outside \[0, 100\)"):
        outputs(compiled, {"f": [[1], [100]], "g": [[], []]})
