"""Models whose collections are quantised: by our function, and by TorchRec's own."""

import copy
import warnings
from typing import Any

import pytest
import torch
from quantised_tables import PLAIN, MixedModel, features_of, float_collection, processed, qconfig, tables, values_of
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.inference import modules as inference
from torchrec.quant import embedding_modules as theirs

from torchrec_qr.inference import quantize_embeddings
from torchrec_qr.quant import QuantCompositionalEmbeddingBagCollection, QuantCompositionalEmbeddingCollection

CLASSES = [
    QuantCompositionalEmbeddingBagCollection,
    QuantCompositionalEmbeddingCollection,
    theirs.EmbeddingBagCollection,
    theirs.EmbeddingCollection,
]


@pytest.mark.parametrize("inplace", [False, True])
def test_all_collections_of_a_model_are_quantised(inplace: bool) -> None:
    model = MixedModel()
    features = features_of(model.ours["pooled"])
    expected = model.eval()(features)
    model.train()
    quantised = quantize_embeddings(model, torch.qint8, inplace=inplace)
    assert (quantised is model) == inplace
    assert [type(collection) for collection in quantised.collections()] == CLASSES
    assert model.training != inplace
    torch.testing.assert_close(quantised(features), expected, rtol=0.03, atol=0.03)
    if not inplace:
        assert torch.equal(model.eval()(features), expected)
        assert not any(hasattr(module, "qconfig") for module in model.modules())


def test_a_collection_that_occurs_twice_is_quantised_once() -> None:
    shared = float_collection(True)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    for inplace in (False, True):
        quantised = quantize_embeddings(model, torch.qint8, inplace=inplace)
        assert type(quantised["a"]) is QuantCompositionalEmbeddingBagCollection
        assert quantised["b"][0] is quantised["a"]


def test_hooks_of_a_collection_stay() -> None:
    module, seen = float_collection(True), []
    module.register_forward_hook(lambda *_: seen.append(True))
    quantise = quantize_embeddings(module, torch.qint8)
    quantise(features_of(module))
    assert seen == [True]


class Derived(EmbeddingBagCollection):
    """A class of a user's."""


def test_models_that_cannot_be_quantised_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has no embedding collection"):
        quantize_embeddings(nn.Linear(2, 2), torch.qint8)
    half = nn.ModuleDict({"a": quantize_embeddings(float_collection(True), torch.qint8), "b": float_collection(True)})
    with pytest.raises(ValueError, match=r"module 'a' \(QuantCompositionalEmbeddingBagCollection\): it is quantised"):
        quantize_embeddings(half, torch.qint8)
    with pytest.raises(TypeError, match=r"module 'x' \(Derived\): there is no quantised form of its class"):
        quantize_embeddings(nn.ModuleDict({"x": Derived(tables=tables(True, kinds=PLAIN))}), torch.qint8)


@pytest.mark.parametrize("quantise", ["ours", "ours, in place", "quantize_inference_model", "quantize_embeddings"])
@pytest.mark.parametrize("as_dict", [False, True], ids=["collection", "dict"])
def test_a_collection_within_feature_processors_is_quantised(as_dict: bool, quantise: str) -> None:
    model = nn.ModuleDict({"arch": nn.ModuleDict({"sparse": processed(float_collection(True, True), as_dict)})})
    before: Any = model["arch"]["sparse"]  # type: ignore[index]
    features = features_of(before._embedding_bag_collection)
    expected = before(features).to_dict()
    if quantise == "quantize_inference_model":
        quantised = inference.quantize_inference_model(model)
    elif quantise == "quantize_embeddings":
        quantised = inference.quantize_embeddings(model, torch.qint8, inplace=False)
    else:
        quantised = quantize_embeddings(model, torch.qint8, inplace="place" in quantise)
    after = quantised["arch"]["sparse"]
    assert type(after._embedding_bag_collection) is QuantCompositionalEmbeddingBagCollection
    for name, values in after(features).to_dict().items():
        torch.testing.assert_close(values, expected[name], rtol=0.03, atol=0.3)
    assert not any(hasattr(module, "qconfig") for module in quantised.modules())


def test_feature_processors_around_torchrecs_own_collection_become_its_own() -> None:
    inner = EmbeddingBagCollection(tables=tables(True, kinds=PLAIN), is_weighted=True)
    quantised = quantize_embeddings(nn.ModuleDict({"sparse": processed(inner, False)}), torch.qint8)
    assert type(quantised["sparse"]) is theirs.FeatureProcessedEmbeddingBagCollection


def test_torchrecs_inference_model_quantises_ours_with_types_per_table() -> None:
    model = MixedModel().eval()
    features = features_of(model.ours["pooled"])
    ours = quantize_embeddings(model, torch.qint8, per_table_weight_dtype={"hash": torch.quint4x2})
    expected = ours(features)
    quantised = inference.quantize_inference_model(model, per_table_weight_dtype={"hash": torch.quint4x2})
    assert [type(collection) for collection in quantised.collections()] == CLASSES
    assert torch.equal(quantised(features), expected)
    assert quantised.ours["pooled"].embedding_bags["hash"].row_type == "int4"


def test_torchrecs_quantize_embeddings_takes_ours_without_arguments() -> None:
    model = MixedModel().eval()
    features = features_of(model.ours["pooled"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stays as floats")
        quantised = inference.quantize_embeddings(model, torch.qint8, False, output_dtype=torch.float16)
    types = [type(collection) for collection in quantised.collections()]
    assert types == [*CLASSES[:3], EmbeddingCollection]  # which TorchRec's function does not take
    expected = quantize_embeddings(model.ours, torch.qint8, output_dtype=torch.float16)
    for name, collection in quantised.ours.items():
        assert torch.equal(values_of(collection(features)), values_of(expected[name](features)))


def test_a_quantisation_that_leaves_ours_as_floats_warns() -> None:
    model = nn.ModuleDict({"sparse": float_collection(True, kinds=PLAIN)})
    for quantise in (
        lambda: inference.quantize_embeddings(model, torch.qint8, inplace=False, additional_mapping={}),
        lambda: inference.quantize_inference_model(copy.deepcopy(model), quantization_mapping={}),
        lambda: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
    ):
        with pytest.warns(UserWarning, match=r"CompositionalEmbeddingBagCollection of tables \['plain'\]: it stays as"):
            kept = quantise()
        assert type(kept["sparse"]) is type(model["sparse"])


@pytest.mark.parametrize("their_class", CLASSES[2:])
def test_from_float_of_torchrecs_classes_returns_ours_for_ours(their_class: Any) -> None:
    pooled = their_class is theirs.EmbeddingBagCollection
    module = float_collection(pooled)
    module.qconfig = qconfig(torch.qint8)
    quantised = their_class.from_float(module)
    assert type(quantised) is CLASSES[not pooled]
    del module.qconfig  # warns, because the module itself stays


@pytest.mark.parametrize("quantise", ["quantize_inference_model", "quantize_embeddings"])
def test_plain_tables_alone_become_torchrecs_own(quantise: str) -> None:
    module = float_collection(True, kinds=PLAIN)
    plain = EmbeddingBagCollection(tables=tables(True, kinds=PLAIN))
    plain.load_state_dict(module.state_dict())
    found = []
    for collection in (module, plain):
        model = nn.ModuleDict({"sparse": collection})
        if quantise == "quantize_embeddings":
            found.append(inference.quantize_embeddings(model, torch.qint8, inplace=False)["sparse"])
        else:
            found.append(inference.quantize_inference_model(model)["sparse"])
    assert [type(quantised) for quantised in found] == [theirs.EmbeddingBagCollection] * 2
    features = features_of(module)
    assert torch.equal(found[0](features).values(), found[1](features).values())
    assert type(quantize_embeddings(module, torch.qint8)) is QuantCompositionalEmbeddingBagCollection
