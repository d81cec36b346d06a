"""One process copies quantised collections to the devices of a plan, by TorchRec's ``shard_quant_model``."""

import copy
from typing import Any

import pytest
import torch
from quantised_tables import MixedModel, features_of, float_collection, processed, values_of
from small_collections import pooled_or_not
from torch import nn
from torchrec.inference import modules as inference

from torchrec_qr.inference import quantize_embeddings


def sharded(model: nn.Module, **how: Any) -> tuple[Any, Any]:
    return inference.shard_quant_model(copy.deepcopy(model), **how)


@pytest.mark.parametrize("world_size", [1, 2])
def test_shard_quant_model_copies_ours_to_the_devices_of_its_plan(world_size: int) -> None:
    model = quantize_embeddings(MixedModel().ours, torch.qint8)
    features = features_of(model["pooled"])
    copied, plan = sharded(model, world_size=world_size, compute_device="cpu", sharding_device="cpu")
    assert [str(of["all_tables"].sharding_spec.shards[0].placement.device()) for of in plan.plan.values()] == [
        "cpu"
    ] * 2
    for name, collection in copied.items():
        assert type(collection) is type(model[name])
        assert torch.equal(values_of(collection(features)), values_of(model[name](features)))
        assert collection.state_dict().keys() == model[name].state_dict().keys()


def test_shard_quant_model_on_the_meta_device_keeps_no_values() -> None:
    """That device is the function's default. Shards of TorchRec's collections have no values there either."""
    model = quantize_embeddings(MixedModel(), torch.qint8)
    copied, plan = sharded(model)
    assert {path: list(of) for path, of in plan.plan.items()} == {
        "ours.pooled": ["all_tables"],
        "ours.sequences": ["all_tables"],
        "theirs_pooled": ["plain"],
        "theirs_sequences": ["plain"],
    }
    assert {tensor.device.type for tensor in copied.state_dict().values()} == {"meta"}
    pooled = copied.ours["pooled"]
    pooled.load_state_dict(model.ours["pooled"].state_dict(), assign=True)
    features = features_of(model.ours["pooled"])
    assert torch.equal(values_of(pooled(features)), values_of(model.ours["pooled"](features)))


def test_the_collection_itself_and_one_within_processors_are_copied() -> None:
    module = quantize_embeddings(float_collection(True), torch.qint8)
    copied, _ = inference.shard_quant_model(module, compute_device="cpu", sharding_device="cpu")
    features = features_of(module)
    assert copied is not module
    assert torch.equal(values_of(copied(features)), values_of(module(features)))
    # Copies on one device share their rows.
    assert copied.embedding_bags["hash"].weights()[0] is module.embedding_bags["hash"].weights()[0]
    within = quantize_embeddings(nn.ModuleDict({"sparse": processed(float_collection(True, True), False)}), torch.qint8)
    copied, plan = sharded(within, compute_device="cpu", sharding_device="cpu")
    assert list(plan.plan) == ["sparse._embedding_bag_collection"]
    assert torch.equal(values_of(copied["sparse"](features)), values_of(within["sparse"](features)))


def test_a_plan_without_the_collection_is_refused() -> None:
    model = quantize_embeddings(nn.ModuleDict({"sparse": float_collection(True)}), torch.qint8)
    _, plan = sharded(model, compute_device="cpu", sharding_device="cpu")
    entries = plan.plan["sparse"]
    entries["hash"] = entries.pop("all_tables")
    with pytest.raises(ValueError, match=r"collection 'sparse': the plan has entries for \['hash'\]; allowed: one for"):
        sharded(model, sharding_device="cpu", sharding_plan=plan)


@pooled_or_not
def test_a_copy_on_another_device_takes_batches_from_any(pooled: bool) -> None:
    """On a CPU there is one device, so that this shows values alone. Several GPUs are untested."""
    module = quantize_embeddings(float_collection(pooled), torch.qint8)
    features = features_of(module)
    expected = values_of(module(features))
    module.batches_move = True
    assert torch.equal(values_of(module(features)), expected)
