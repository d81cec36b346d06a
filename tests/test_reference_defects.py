"""Defects of ``QREmbeddingBag`` of facebookresearch/dlrm, and of others that follow it, do not occur here."""

from typing import Any

import pytest
import torch
from batches import batch
from single_tables import bag_table
from torch import Tensor

from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    ExplicitPartitions,
    QuotientRemainder,
)

GROUPINGS = ("strided", "adjacent")


def weights_of(ebc: CompositionalEmbeddingBagCollection, table: str = "t") -> list[Tensor]:
    return [p.detach() for p in ebc.embedding_bags[table].parameters()]


def test_quotients_of_large_ids_are_exact() -> None:
    """``(input / c).long()`` goes through float32: 16,777,219 / 4 gives row 4,194,305."""
    num_ids, x = 16_777_220, 16_777_219
    assert int((torch.tensor([x]) / 4).long()) == 4_194_305  # the defect, so that its cause stays on record
    spec = QuotientRemainder(num_collisions=4, grouping="adjacent")
    assert spec.bind(num_ids).rows(torch.tensor([x])).tolist() == [[4_194_304, 3]]
    ebc = CompositionalEmbeddingBagCollection(
        tables=[bag_table(spec, num_embeddings=num_ids, embedding_dim=4, init_fn=torch.nn.init.zeros_)]
    )
    quotient, remainder = weights_of(ebc)
    quotient[4_194_304], remainder[3] = 3, 5
    assert ebc(batch({"f": [[x], [x - 1]]}))["f"].tolist() == [[15.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("grouping", ["strided", pytest.param("adjacent", marks=pytest.mark.slow)])
def test_a_table_of_40_million_rows_keeps_all_quotients_and_remainders(grouping: Any) -> None:
    """Quotients in float32 are wrong for 6,611,392 of these ids, lose 805,695 pairs and leave the table twice."""
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
    spec = QuotientRemainder(num_collisions=4, grouping="adjacent")
    table = bag_table(spec, operation=operation, embedding_dim=4, init_fn=torch.nn.init.normal_)
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


def test_parameters_and_gradients_follow_the_module() -> None:
    """dlrm: "autograd breaks with multiple GPUs", all tables copied to GPU 0 (dlrm#24)."""
    explicit = ExplicitPartitions([[x // 4 for x in range(100)], [x % 4 for x in range(100)]])
    tables = [
        bag_table(QuotientRemainder(num_collisions=4), name="a", feature_names=["a"]),
        bag_table(explicit, name="b", feature_names=["b"]),
    ]
    ebc = CompositionalEmbeddingBagCollection(tables=tables)
    ebc(batch({"a": [[1]], "b": [[2]]})).values().sum().backward()
    for device in ("cpu", "meta"):
        moved = ebc.to(device)
        tensors = [*moved.parameters(), *moved.buffers(), *(p.grad for p in moved.parameters())]
        assert len(tensors) == 4 + 2 + 4  # two fingerprints; a class map is no buffer
        tensors.append(moved.embedding_bags["b"].class_map)
        assert {t.device.type for t in tensors} == {device}
        assert moved.device.type == device


def test_strided_grouping_keeps_adjacent_ids_apart() -> None:
    """The remainder indexes the paper's large table, the quotient dlrm's, so that there adjacent ids share rows."""
    for num_ids, m in ((100, 4), (101, 4), (1000, 7)):
        ids = torch.arange(num_ids)
        strided, adjacent = (
            QuotientRemainder(num_collisions=m, grouping=grouping).bind(num_ids) for grouping in GROUPINGS
        )
        assert strided.main == 0
        first = strided.class_rows(ids)[0]
        assert not bool((first[1:] == first[:-1]).any())
        first = adjacent.class_rows(ids)[0]
        assert int((first[1:] == first[:-1]).sum()) == num_ids - strided.sizes[0]
