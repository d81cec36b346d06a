"""Function transforms of lookups, as of TorchRec's collection; forward-mode derivatives, which neither has."""

import pytest
import torch
from single_tables import bag_table
from torch import Tensor
from torch.autograd import forward_ad
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from torchrec_qr import CompositionalEmbeddingBagCollection, QuotientRemainder
from torchrec_qr.modules.table import CompositionalTable
from torchrec_qr.ops.arguments import Batch, DenseGradient
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.lookup import stepped_lookup

BATCH = KeyedJaggedTensor(["f"], torch.tensor([3, 7, 7, 19, 0]), lengths=torch.tensor([2, 0, 3]))


def collection(operation: str, data_type: DataType = DataType.FP32) -> CompositionalEmbeddingBagCollection:
    torch.manual_seed(0)
    config = bag_table(QuotientRemainder(num_collisions=4), num_embeddings=20, operation=operation, data_type=data_type)
    return CompositionalEmbeddingBagCollection(tables=[config])


def values_of(module: CompositionalEmbeddingBagCollection, parameters: dict[str, Tensor]) -> Tensor:
    return torch.func.functional_call(module, parameters, (BATCH,)).values()


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_func_grad_is_the_gradient_of_backward(operation: str) -> None:
    module = collection(operation)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    found = torch.func.grad(lambda p: values_of(module, p).square().sum())(parameters)
    module(BATCH).values().square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_vmap_over_models_is_one_after_the_other(operation: str) -> None:
    module = collection(operation)
    stacked = {name: torch.stack([p.detach(), 2 * p.detach(), -p.detach()]) for name, p in module.named_parameters()}
    out = torch.func.vmap(lambda p: values_of(module, p))(stacked)
    for i in range(3):
        torch.testing.assert_close(out[i], values_of(module, {name: p[i] for name, p in stacked.items()}))


def duals(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: forward_ad.make_dual(w.detach(), torch.ones_like(w)) for name, w in weights.items()}


@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.BF16])
@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_forward_mode_raises_as_torchrecs_does(operation: str, data_type: DataType) -> None:
    """The kernels would give no tangent, in silence."""
    module = collection(operation, data_type)
    with forward_ad.dual_level():
        parameters = duals(dict(module.named_parameters()))
        with pytest.raises(NotImplementedError, match=r"forward AD|jvp"):
            values_of(module, parameters)


def test_forward_mode_of_a_sharded_lookup_raises() -> None:
    table = collection("mult").embedding_bags["t"]
    assert isinstance(table, CompositionalTable)
    batch = Batch(BATCH.values(), BATCH.offsets(), None, True)
    with forward_ad.dual_level():
        weights = list(duals({str(j): w for j, w in enumerate(table.weights())}).values())
        with pytest.raises(NotImplementedError, match="jvp"):
            stepped_lookup(Description([table.layout], ["t"]), weights, batch, lambda: [DenseGradient()] * 2)
