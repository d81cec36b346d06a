"""What TorchRec would do with an unsharded collection in silence, or with an error that names nothing."""

from typing import Any

import pytest
import torch
from batches import batch
from single_tables import bag_table, collection_of, plain_table
from small_collections import BATCH, collection, partitions_of, pooled_or_not
from torch import nn
from torch.ao.quantization import PlaceholderObserver, QConfig
from torchrec import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, fuse_embedding_optimizer
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantBags
from torchrec.quant.embedding_modules import QuantManagedCollisionEmbeddingBagCollection as QuantManaged

from torchrec_qr import CompositionalEmbeddingBagCollection
from torchrec_qr.inference import quantize_embeddings

CPU = torch.device("cpu")
PARTITIONS = partitions_of("strided")


def fused(model: nn.Module) -> nn.Module:
    return fuse_embedding_optimizer(model, torch.optim.SGD, {"lr": 0.5}, CPU)


@pooled_or_not
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_fused_collections_are_refused(pooled: bool, inside: bool, plain: bool) -> None:
    model: Any = collection_of([plain_table(pooled, name="t")]) if plain else collection(PARTITIONS, pooled)
    names = "'t'" if plain else "'t', 'p'"
    match = rf"{type(model).__name__}, tables \[{names}\]: fuse_embedding_optimizer is not supp.*allowed: apply_opt"
    with pytest.raises(NotImplementedError, match=match):
        fused(nn.Sequential(nn.Sequential(model)) if inside else model)
    assert [name for name, _ in model.named_children()] == ["embedding_bags" if pooled else "embeddings"]


def test_torchrecs_own_collections_are_fused_as_ever() -> None:
    model = fused(nn.Sequential(EmbeddingBagCollection(tables=[plain_table()])))
    assert isinstance(model[0], FusedEmbeddingBagCollection)


@pooled_or_not
def test_an_optimizer_in_backward_steps_an_unsharded_collection(pooled: bool) -> None:
    """The reference steps by the gradients of a collection without one: SGD of a rate of 0.5."""
    model, alone = (collection(PARTITIONS, pooled) for _ in range(2))
    apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.5})
    for of in (model, alone):
        out = of(batch(BATCH))
        values = [out.values()] if pooled else [jagged.values() for jagged in out.values()]
        torch.cat([v.flatten() for v in values]).square().sum().backward()
    for (name, p), before in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert before.grad is not None
        assert before.grad.any()
        torch.testing.assert_close(p, before - 0.5 * before.grad, msg=name)


def with_qconfig(module: nn.Module, dtype: torch.dtype) -> Any:
    weight = PlaceholderObserver.with_args(dtype=dtype)
    module.qconfig = QConfig(activation=PlaceholderObserver.with_args(dtype=torch.float), weight=weight)  # type: ignore
    return module


class DerivedEmbeddingBagCollection(CompositionalEmbeddingBagCollection):
    """A class of a user's."""


def test_from_float_of_managed_collisions_and_of_derived_classes_is_refused() -> None:
    tables = [plain_table(name="p"), bag_table(PARTITIONS)]
    module = managed(tables)
    match = r"CompositionalEmbeddingBagCollection, tables \['t'\]: from_float .* allowed: torchrec_qr.inference.quanti"
    with pytest.raises(NotImplementedError, match=match):
        QuantManaged.from_float(with_qconfig(module, torch.qint8))
    with pytest.raises(NotImplementedError, match=match.replace("Compositional", "Derived")):
        QuantBags.from_float(with_qconfig(DerivedEmbeddingBagCollection([bag_table(PARTITIONS)]), torch.qint8))
    features = batch({"f": [[5], [7, 9]], "f_p": [[1], []]})
    expected, _ = module.eval()(features)
    out, _ = quantize_embeddings(module, torch.float32)(features)
    assert expected.values().any()
    assert torch.equal(out.values(), expected.values())


def managed(tables: list[Any]) -> ManagedCollisionEmbeddingBagCollection:
    """A collection behind managed collisions, as TorchRec builds it unsharded."""
    modules = {
        table.name: MCHManagedCollisionModule(
            zch_size=table.num_embeddings,
            device=CPU,
            eviction_interval=2,
            eviction_policy=DistanceLFU_EvictionPolicy(),
        )
        for table in tables
    }
    return ManagedCollisionEmbeddingBagCollection(collection_of(tables), ManagedCollisionCollection(modules, tables))


def test_from_float_of_plain_tables_equals_torchrecs_own() -> None:
    tables = [plain_table(name="p"), plain_table(name="q")]
    ours, theirs = collection_of(tables), EmbeddingBagCollection(tables=tables)
    theirs.load_state_dict(ours.state_dict())
    features = batch({"f_p": [[0, 5, 99], []], "f_q": [[1], [2, 2]]})
    out, expected = (QuantBags.from_float(with_qconfig(module, torch.qint8))(features) for module in (ours, theirs))
    assert expected.values().any()
    assert torch.equal(out.values(), expected.values())
