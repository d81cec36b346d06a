"""Quantised collections save and load their rows, and refuse those of others."""

import copy
import io
from typing import Any

import pytest
import torch
from kinds import kind_of
from quantised_tables import SERVED, features_of, float_collection, qconfig, tables, values_of
from single_tables import bag_table, collection_of
from small_collections import OPERATIONS, pooled_or_not
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType

from torchrec_qr import QuotientRemainder
from torchrec_qr.inference import quantize_embeddings
from torchrec_qr.quant import QuantCompositionalEmbeddingBagCollection, QuantCompositionalEmbeddingCollection

KINDS = {**SERVED, "path": (kind_of("strided", 2).partitions, OPERATIONS["path"])}


def quantised_class(pooled: bool) -> Any:
    return QuantCompositionalEmbeddingBagCollection if pooled else QuantCompositionalEmbeddingCollection


def configs_of(module: Any) -> Any:
    return module.embedding_bag_configs() if hasattr(module, "embedding_bags") else module.embedding_configs()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pooled_or_not
def test_a_state_dict_is_loaded(pooled: bool, device: str, assign: bool) -> None:
    trained = float_collection(pooled, kinds=KINDS)
    quantised = quantize_embeddings(trained, torch.qint8, per_table_weight_dtype={"hash": torch.quint4x2})
    saved = quantised.state_dict()
    own = "embedding_bags" if pooled else "embeddings"
    assert set(saved) == set(trained.state_dict())
    assert saved[f"{own}.plain.weight"].dtype == torch.uint8
    assert saved[f"{own}.plain.weight"].shape == (100, 20)

    new = quantised_class(pooled)(configs_of(quantised), device=torch.device(device))
    if device == "meta" and not assign:
        new.to_empty(device="cpu")
    new.load_state_dict(saved, assign=assign)
    features = features_of(trained)
    assert torch.equal(values_of(new(features)), values_of(quantised(features)))
    assert new.device == torch.device("cpu")


def test_a_state_dict_of_another_table_is_refused() -> None:
    def quantised(grouping: Any) -> Any:
        table = bag_table(QuotientRemainder(num_collisions=10, grouping=grouping))
        return quantize_embeddings(collection_of([table]), torch.qint8)

    with pytest.raises(ValueError, match="table 't': the checkpoint is of another table: grouping: saved strided"):
        quantised("adjacent").load_state_dict(quantised("strided").state_dict())


@pooled_or_not
def test_quantising_on_the_meta_device_makes_what_a_state_dict_fills(pooled: bool) -> None:
    trained = float_collection(pooled, kinds=KINDS)
    on_meta = quantize_embeddings(collection_of(tables(pooled, kinds=KINDS), "meta"), torch.qint8)
    assert {t.device.type for t in on_meta.state_dict().values()} == {"meta"}
    quantised = quantize_embeddings(trained, torch.qint8)
    on_meta.load_state_dict(quantised.state_dict(), assign=True)
    features = features_of(trained)
    assert torch.equal(values_of(on_meta(features)), values_of(quantised(features)))


def test_a_default_device_moves_no_numbers_of_the_operators() -> None:
    with torch.device("meta"):
        new = QuantCompositionalEmbeddingBagCollection(tables=configs_of(float_collection(True)))
    assert {t.device.type for t in new.state_dict().values()} == {"meta"}
    trained = quantize_embeddings(float_collection(True), torch.float32)
    new.load_state_dict(trained.state_dict(), assign=True)
    features = features_of(trained)
    assert torch.equal(values_of(new(features)), values_of(trained(features)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -7e4])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint4x2, torch.float16])
def test_a_value_that_rows_cannot_have_is_refused(dtype: torch.dtype, value: float) -> None:
    module = float_collection(True, kinds={"strided_mult": SERVED["strided_mult"]})
    module.embedding_bags["strided_mult"].partition_1.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"table 'strided_mult', partition 1: values lie in \[.*\]; allowed in rows"):
        quantize_embeddings(module, dtype)


def test_types_that_rows_and_outputs_cannot_have_are_refused() -> None:
    module = float_collection(True, kinds={"hash": SERVED["hash"]})
    with pytest.raises(NotImplementedError, match=r"table 'hash': rows of torch.int32; allowed: torch.qint8, "):
        quantize_embeddings(module, torch.int32)
    with pytest.raises(NotImplementedError, match=r"tables \['hash'\]: output_dtype=torch.qint8; allowed: torch.flo"):
        quantize_embeddings(module, torch.qint8, output_dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"there are no tables \['t'\]; allowed: \['hash'\]"):
        quantize_embeddings(module, torch.qint8, per_table_weight_dtype={"t": torch.quint4x2})
    (config,) = module.embedding_bag_configs()
    config.data_type = DataType.INT2
    with pytest.raises(NotImplementedError, match=r"table 'hash': data_type=INT2; allowed: FP32, FP16, BF16, INT8, IN"):
        QuantCompositionalEmbeddingBagCollection(tables=[config])


def test_from_float_takes_our_collections_with_a_qconfig() -> None:
    config = EmbeddingBagConfig(name="t", feature_names=["f"], num_embeddings=10, embedding_dim=4)
    with pytest.raises(ValueError, match="it has no qconfig"):
        QuantCompositionalEmbeddingBagCollection.from_float(collection_of([config]))
    theirs: Any = EmbeddingBagCollection(tables=[config])
    theirs.qconfig = qconfig(torch.qint8)
    with pytest.raises(TypeError, match="table 't': it is a EmbeddingBag; allowed: CompositionalTable, PlainEmb"):
        QuantCompositionalEmbeddingBagCollection.from_float(theirs)


def test_the_float_collection_stays_as_it_is() -> None:
    module = float_collection(True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    quantised = quantize_embeddings(module, torch.float32)
    for table in quantised.embedding_bags.values():
        for rows in table.weights():
            rows.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not hasattr(module, "qconfig")
    assert {config.data_type for config in module.embedding_bag_configs()} == {DataType.FP32}


def test_a_batch_that_lacks_a_feature_or_weights_is_refused() -> None:
    module = quantize_embeddings(float_collection(True, True, kinds=KINDS), torch.qint8)
    features = features_of(module)
    for config in configs_of(module)[-2:]:  # an operator's, and PyTorch's
        alone = QuantCompositionalEmbeddingBagCollection(tables=[config])
        with pytest.raises(KeyError, match=f"feature 'f_{config.name}' is not in the batch; its keys are"):
            alone(features.split([1, len(features.keys()) - 1])[0])
    with pytest.raises(ValueError, match="a weighted collection got a batch without weights"):
        module(type(features)(keys=features.keys(), values=features.values(), lengths=features.lengths()))


@pooled_or_not
def test_rows_that_are_replaced_are_read(pooled: bool) -> None:
    """`functional_call`, deep copies, pickles and assignment replace buffers."""
    module = quantize_embeddings(float_collection(pooled), torch.float32)
    features = features_of(module)
    expected = values_of(module(features))
    zeros = {name: torch.zeros_like(t) for name, t in module.named_buffers() if "weight" in name}
    assert not values_of(torch.func.functional_call(module, zeros, (features,))).any()
    copied = copy.deepcopy(module)
    for table in (copied.embedding_bags if pooled else copied.embeddings).values():
        for rows in table.weights():
            rows.zero_()
    assert not values_of(copied(features)).any()
    assert torch.equal(values_of(module(features)), expected)
    loaded = torch.load(_saved(module), weights_only=False)
    assert torch.equal(values_of(loaded(features)), expected)
    module.load_state_dict({**module.state_dict(), **zeros}, assign=True)
    assert not values_of(module(features)).any()


def _saved(module: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("assign", [False, True])
def test_rows_of_floats_and_of_bytes_are_not_loaded_as_one_another(assign: bool) -> None:
    """An int4 row of 8 columns has 8 bytes, so that shapes do not differ."""
    module = collection_of([bag_table(QuotientRemainder(num_collisions=10), embedding_dim=8)])
    quantised = quantize_embeddings(module, torch.quint4x2)
    saved = module.state_dict()["embedding_bags.t.partition_0.weight"], quantised.embedding_bags["t"].weights()[0]
    assert saved[0].shape == saved[1].shape
    with pytest.raises(ValueError, match=r"table 't': .*partition_0\.weight' has rows of torch\.float32"):
        quantised.load_state_dict(module.state_dict(), assign=assign)
    with pytest.raises(ValueError, match=r"table 't': .*partition_0\.weight' has rows of torch\.uint8"):
        module.load_state_dict(quantised.state_dict(), assign=assign)
