"""TorchRec's own collection with the full rows of ours has equal outputs."""

from typing import Any

import pytest
import torch
from batches import batch
from cases import randomize
from sharded_model import DIM, NUM_IDS, tables
from single_tables import bag_table, collection_of, plain_table, sequence_table, table_of
from small_collections import BATCH, OPERATIONS, S, each_operation, partitions_of, pooled_or_not
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_qr import CompositionalEmbeddingCollection, QuotientRemainder
from torchrec_qr.inference import materialize, to_plain

SPEC = QuotientRemainder(num_collisions=4)


def of_ids(features: list[str], generator: torch.Generator) -> dict[str, list[list[int]]]:
    """Bags of 0, 1 and 3 ids."""
    return {f: [torch.randint(NUM_IDS, (n,), generator=generator).tolist() for n in (3, 0, 1)] for f in features}


def test_a_pooled_collection_of_many_kinds() -> None:
    """Bags are summed in another order, so that outputs differ by roundings; those of one id do not."""
    configs = [c for c in tables() if c.num_embeddings == NUM_IDS]
    own = collection_of([*configs, bag_table(SPEC, name="shared", num_embeddings=NUM_IDS, feature_names=["f_plain"])])
    randomize(own, seed=1)
    plain = to_plain(own)
    assert type(plain) is EmbeddingBagCollection
    features = list(dict.fromkeys(f for c in own.embedding_bag_configs() for f in c.feature_names))
    given = batch(of_ids(features, torch.Generator().manual_seed(0)))
    out, expected = plain(given), own(given)
    assert out.keys() == expected.keys()
    assert {"f_plain@plain", "f_plain@shared"} <= set(out.keys())
    torch.testing.assert_close(out.values(), expected.values(), rtol=1e-5, atol=1e-5)
    one_hot = batch({f: [[x] for x in range(NUM_IDS)] for f in features})
    assert torch.equal(plain(one_hot).values(), own(one_hot).values())
    for ours, theirs in zip(own.embedding_bag_configs(), plain.embedding_bag_configs(), strict=True):
        assert theirs.data_type == DataType.FP32
        assert (theirs.num_embeddings, theirs.embedding_dim) == (ours.num_embeddings, ours.embedding_dim)
        assert (theirs.name, theirs.pooling) == (ours.name, ours.pooling)
    assert {w.shape for w in plain.state_dict().values()} == {(NUM_IDS, DIM), (NUM_IDS, 8)}


@pooled_or_not
@each_operation
def test_every_operation(operation: str, pooled: bool) -> None:
    own = collection_of([table_of(partitions_of("explicit"), pooled, **OPERATIONS[operation])])
    randomize(own, seed=1)
    out, expected = to_plain(own)(batch({"f": BATCH["f"]})), own(batch({"f": BATCH["f"]}))
    if pooled:
        torch.testing.assert_close(out["f"], expected["f"], rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(out["f"].values(), expected["f"].values(), rtol=1e-5, atol=1e-5)
        assert torch.equal(out["f"].lengths(), expected["f"].lengths())


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
def test_sequences_in_half_precision(data_type: DataType) -> None:
    configs: list[Any] = [
        sequence_table(SPEC, data_type=data_type),
        sequence_table(SPEC, name="c", operation="concat", data_type=data_type),
        plain_table(pooled=False, name="p", data_type=data_type),
    ]
    own = collection_of(configs)
    randomize(own, seed=1)
    plain = to_plain(own)
    assert type(plain) is EmbeddingCollection
    given = batch({"f": [[1, 99], []], "f_c": [[5], [5, 0]], "f_p": [[], [98]]})
    out, expected = plain(given), own(given)
    assert list(out) == list(expected)
    for feature, values in expected.items():
        assert torch.equal(out[feature].values(), values.values())


def test_flags_are_kept() -> None:
    own = collection_of([bag_table(SPEC), plain_table(name="p")], is_weighted=True)
    for p in own.embedding_bags["t"].parameters():
        p.requires_grad_(False)
    plain = to_plain(own.eval())
    assert plain.is_weighted()
    assert not plain.training
    assert [p.requires_grad for p in plain.parameters()] == [False, True]
    given = batch({"f": [[1, 99]], "f_p": [[5, 5]]}, weights=torch.tensor([0.5, -2.0, 3.0, 1.0]))
    torch.testing.assert_close(plain(given).values(), own(given).values())
    ids = CompositionalEmbeddingCollection(tables=[sequence_table(SPEC)], need_indices=True)
    assert to_plain(ids)(batch({"f": [[7]]}))["f"].weights().tolist() == [7]


def test_one_table_as_an_embedding_of_torch() -> None:
    own = collection_of([table_of(SPEC, pooled=False)])
    embedding = torch.nn.Embedding.from_pretrained(materialize(own, "t"))
    ids = torch.arange(S)
    assert torch.equal(embedding(ids), own(batch({"f": [ids.tolist()]}))["f"].values())


def test_what_torchrec_cannot_have_is_refused_by_name() -> None:
    mean = collection_of([bag_table(SPEC, pooling=PoolingType.MEAN)], is_weighted=True)
    with pytest.raises(NotImplementedError, match=r"table 't': pooling=.*MEAN.* of a weighted collection .*SUM"):
        to_plain(mean)
    mixed = collection_of([sequence_table(SPEC), sequence_table(SPEC, name="wide", embedding_dim=16)])
    with pytest.raises(ValueError, match=r"the tables have dimensions \{'t': 8, 'wide': 16\}"):
        to_plain(mixed)
    with pytest.raises(ValueError, match="is on the meta device"):
        to_plain(collection_of([bag_table(SPEC)], "meta"))
    with pytest.raises(TypeError, match="Linear is no float collection of torchrec_qr"):
        to_plain(torch.nn.Linear(2, 2))  # type: ignore[call-overload]


@pooled_or_not
def test_a_table_that_hashes_its_ids_is_refused(pooled: bool) -> None:
    hashed = collection_of([table_of(SPEC, pooled, id_hash="splitmix64")])
    with pytest.raises(NotImplementedError, match="table 't': a full table is not supported with id_hash"):
        to_plain(hashed)
