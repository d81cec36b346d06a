"""What is wrong in ``QREmbeddingBag`` of facebookresearch/dlrm, and in others that follow it, is right here."""

import math
from typing import Any

import pytest
import torch
from batches import batch
from torch import Tensor
from torchrec import EmbeddingBagConfig
from torchrec.models.dlrm import DLRM

from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    ExplicitPartitions,
    QuotientRemainder,
)


def config(
    num_ids: int, num_collisions: int, grouping: Any = "strided", **fields: Any
) -> CompositionalEmbeddingBagConfig:
    return CompositionalEmbeddingBagConfig(
        **{"name": "t", "feature_names": ["f"], "embedding_dim": 8}
        | fields
        | {"num_embeddings": num_ids, "partitions": QuotientRemainder(num_collisions=num_collisions, grouping=grouping)}
    )


def weights_of(ebc: CompositionalEmbeddingBagCollection, table: str = "t") -> list[Tensor]:
    return [p.detach() for p in ebc.embedding_bags[table].parameters()]


@pytest.mark.parametrize("init", ["unit", "identity", "balanced"])
@pytest.mark.parametrize("operation", ["mult", "add"])
def test_init_has_no_mean(operation: str, init: str) -> None:
    """``uniform_(w, sqrt(1/n))`` gives U[√(1/n), 1]: a mean of 1.045 (add) and .278 (mult) at n = 10,000."""
    torch.manual_seed(0)
    table = config(10_000, 4, operation=operation, init=init, embedding_dim=64)
    ebc = CompositionalEmbeddingBagCollection(tables=[table])
    embeddings = ebc(batch({"f": [[x] for x in range(0, 10_000, 7)]}))["f"].detach()
    full_table_std = 1 / math.sqrt(3 * 10_000)  # 0.0058
    assert abs(float(embeddings.mean())) < 0.1 * full_table_std
    # One draw: the four rows of the small partition leave the balanced mode a few per cent either way.
    assert float(embeddings.std()) == pytest.approx(full_table_std, rel=0.15)


def test_quotients_of_large_ids_are_exact() -> None:
    """``(input / c).long()`` goes through float32: 16,777,219 / 4 gives row 4,194,305."""
    num_ids, x = 16_777_220, 16_777_219
    assert int((torch.tensor([x]) / 4).long()) == 4_194_305  # the defect, so that its cause stays on record
    assert QuotientRemainder(num_collisions=4, grouping="adjacent").bind(num_ids).rows(torch.tensor([x])).tolist() == [
        [4_194_304, 3]
    ]
    ebc = CompositionalEmbeddingBagCollection(
        tables=[config(num_ids, 4, "adjacent", embedding_dim=4, init_fn=torch.nn.init.zeros_)]
    )
    quotient, remainder = weights_of(ebc)
    quotient[4_194_304], remainder[3] = 3, 5
    assert ebc(batch({"f": [[x], [x - 1]]}))["f"].tolist() == [[15.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("grouping", ["strided", pytest.param("adjacent", marks=pytest.mark.slow)])
def test_a_table_of_40_million_rows_keeps_all_quotients_and_remainders(grouping: Any) -> None:
    """Of these, float32 gets 6,611,392 quotients wrong, loses 805,695 pairs and leaves the table twice."""
    num_ids, chunk = 40_000_000, 4_000_000
    partitions = QuotientRemainder(num_collisions=4, grouping=grouping).bind(num_ids)
    assert partitions.sizes == (10_000_000, 4)
    for start in range(0, num_ids, chunk):
        ids = torch.arange(start, start + chunk)
        first, second = partitions.class_rows(ids)
        if grouping == "adjacent":
            assert torch.equal(first, ids >> 2)
            assert torch.equal(second, ids & 3)
        else:
            assert torch.equal(second * 10_000_000 + first, ids)
            assert int(first.max()) < 10_000_000


@pytest.mark.parametrize("operation", ["mult", "path"])
def test_composes_each_id_before_pooling(operation: str) -> None:
    """Pooling first (dlrm#366) gives (Σ w_q)·(Σ w_r): ids 5 and 38 at c = 4 already differ."""
    table = config(100, 4, "adjacent", operation=operation, embedding_dim=4, init_fn=torch.nn.init.normal_)
    ebc = CompositionalEmbeddingBagCollection(tables=[table])
    first, second = weights_of(ebc)
    out = ebc(batch({"f": [[5, 38]]}))["f"][0]
    if operation == "mult":
        pooled_first = (first[1] + first[9]) * (second[1] + second[2])
        expected = first[1] * second[1] + first[9] * second[2]
        assert float((pooled_first - expected).abs().max()) > 0.1
    else:
        expected = sum(second[r, :16].view(4, 4) @ first[q] + second[r, 16:] for q, r in ((1, 1), (9, 2)))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("operation", ["mult", "add", "concat", "path"])
def test_a_weight_of_two_counts_twice(operation: str) -> None:
    """Weights inside each pooled lookup make mult four times as large."""
    table = config(100, 4, "adjacent", operation=operation)
    ebc = CompositionalEmbeddingBagCollection(tables=[table], is_weighted=True)
    bags = {"f": [[5, 38], [7]]}
    once, twice = (ebc(batch(bags, torch.full((3,), w)))["f"] for w in (1.0, 2.0))
    assert torch.equal(twice, 2 * once)
    assert bool((once != 0).all())


def test_concat_beside_plain_tables_keeps_one_width() -> None:
    """Two rows of D each make concat 2D wide; with a threshold the interaction then meets D and 2D."""
    torch.manual_seed(0)
    ebc = CompositionalEmbeddingBagCollection(
        tables=[
            config(100, 4, operation="concat", embedding_dim=16),
            EmbeddingBagConfig(name="small", num_embeddings=10, embedding_dim=16, feature_names=["g"]),
        ]
    )
    kjt = batch({"f": [[5, 38]], "g": [[3]]})
    assert ebc(kjt).length_per_key() == [16, 16]
    model = DLRM(ebc, dense_in_features=3, dense_arch_layer_sizes=[16], over_arch_layer_sizes=[4, 1])
    dense = torch.rand(1, 3)
    (w0, w1), small = weights_of(ebc), ebc.embedding_bags["small"].weight
    f = torch.cat([w0[5] + w0[13], w1[0] + w1[1]])  # 25 rows in partition 0
    d = model.dense_arch(dense)[0]
    interaction = torch.cat([d, torch.stack([d @ f, d @ small[3], f @ small[3]])])
    logit = model.over_arch(interaction[None])
    torch.testing.assert_close(model(dense, kjt), logit)


def test_parameters_and_gradients_follow_the_module() -> None:
    """dlrm: "autograd breaks with multiple GPUs", all tables copied to GPU 0 (dlrm#24)."""
    explicit = ExplicitPartitions([[x // 4 for x in range(100)], [x % 4 for x in range(100)]])
    tables = [
        config(100, 4, name="a", feature_names=["a"]),
        CompositionalEmbeddingBagConfig(
            name="b", feature_names=["b"], num_embeddings=100, embedding_dim=8, partitions=explicit
        ),
    ]
    ebc = CompositionalEmbeddingBagCollection(tables=tables)
    ebc(batch({"a": [[1]], "b": [[2]]})).values().sum().backward()
    for device in ("cpu", "meta"):
        moved = ebc.to(device)
        tensors = [*moved.parameters(), *moved.buffers(), *(p.grad for p in moved.parameters())]
        assert len(tensors) == 4 + 2 + 4  # two fingerprints; a class map is no buffer
        tensors += moved.embedding_bags["b"].description.class_maps
        assert {t.device.type for t in tensors} == {device}
        assert moved.device.type == device


def test_strided_grouping_keeps_neighbours_apart() -> None:
    """The remainder indexes the paper's large table, the quotient dlrm's, so that there neighbours share rows."""
    for num_ids, m in ((100, 4), (101, 4), (1000, 7)):
        strided = QuotientRemainder(num_collisions=m).bind(num_ids)
        r0 = -(-num_ids // m)
        ids = torch.arange(num_ids)
        first, second = strided.class_rows(ids)
        assert torch.equal(first, ids % r0)
        assert torch.equal(second, ids // r0)
        assert not bool((first[1:] == first[:-1]).any())
        assert strided.main == 0
        adjacent = QuotientRemainder(num_collisions=m, grouping="adjacent").bind(num_ids).class_rows(ids)[0]
        assert int((adjacent[1:] == adjacent[:-1]).sum()) == num_ids - r0
