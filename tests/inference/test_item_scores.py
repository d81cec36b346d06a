"""Scores of all items, and the best items, equal the product with the full rows, which the oracle has."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import configs, oracle_of, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from near import assert_near
from single_tables import collection_of, plain_table, sequence_table, table_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.modules.embedding_configs import DataType

from torchrec_qr import ChineseRemainder, HashPartition, MixedRadix, QuotientRemainder
from torchrec_qr.inference import materialize, score_all, top_items
from torchrec_qr.inference.score_blocks import score_blocks
from torchrec_qr.modules.table import CompositionalTable
from torchrec_qr.partitions import PartitionSpec

S = 30_011
SPECS: dict[str, PartitionSpec] = {
    "strided": QuotientRemainder(balanced=True),
    "strided, few remainders": QuotientRemainder(num_collisions=3),
    "adjacent": QuotientRemainder(num_collisions=4, grouping="adjacent"),
    "no collisions": QuotientRemainder(num_collisions=1, grouping="adjacent"),
    "three digits": MixedRadix(balanced=True, num_partitions=3),
    "one digit": MixedRadix(sizes=[S]),
    "unused digit": MixedRadix(sizes=[S, 3, 2]),
    "coprime": ChineseRemainder(balanced=True),
    "hash": HashPartition(rows=700),
}
# Paths are scored by full rows, whatever the digits of ids.
CASES = [(spec, operation) for operation in ("mult", "add", "concat") for spec in SPECS]
CASES += [("strided", "path"), ("coprime", "path"), ("one digit", "path")]


def users_of(count: int, dim: int) -> Tensor:
    return torch.empty(count, dim).uniform_(-1, 1, generator=torch.Generator().manual_seed(count))


def all_scores(collection: Any, users: Tensor, num_ids: int, at_once: int) -> Tensor:
    """The blocks end to end, each beginning where the one before ends."""
    blocks = list(score_blocks(collection, "t", users, num_ids, at_once=at_once))
    ends = [first + scores.shape[1] for first, scores in blocks]
    assert [first for first, _ in blocks] == [0, *ends[:-1]]
    assert all(start < end for start, end in pairwise([0, *ends]))
    return torch.cat([scores for _, scores in blocks], dim=1)


@settings(max_examples=60, deadline=None)
@given(configs(), st.booleans(), st.sampled_from([0, 1, 3, 40]), st.sampled_from([1, 60, 700, 5000, 10**6]))
def test_scores_are_those_of_the_full_rows(given_table: Any, pooled: bool, count: int, at_once: int) -> None:
    bag, kind = given_table
    fields = {name: getattr(bag, name) for name in ("operation", "embedding_dim", "data_type", "path_hidden")}
    fields |= {"path_activation": bag.path_activation, "num_embeddings": bag.num_embeddings}
    config = table_of(kind.partitions, pooled, **fields)
    collection = collection_of([plain_table(pooled, name="p"), config])
    randomize(collection, seed=count)
    (table,) = (module for module in collection.modules() if isinstance(module, CompositionalTable))
    oracle = oracle_of(config, kind, table)
    rows = torch.stack([oracle.embed(x) for x in range(config.num_embeddings)]).detach()
    users = users_of(count, config.embedding_dim)
    with torch.no_grad():
        scores = all_scores(collection, users, config.num_embeddings, at_once)
        into = torch.full_like(scores, torch.nan)
        for _ in score_blocks(collection, "t", users, config.num_embeddings, into, at_once):
            pass
    assert_near(into, users.double() @ rows.T, rtol=1e-5)
    assert_near(scores, users.double() @ rows.T, rtol=1e-5)
    torch.testing.assert_close(score_all(collection, "t", users), scores, rtol=1e-5, atol=1e-5)


def collection_of_integers(spec: str, operation: str, data_type: DataType = DataType.FP32) -> Any:
    """A table whose scores of integers are exact in fp32, so that equal ones are equal to the bit."""
    fields: dict[str, Any] = {"num_embeddings": S, "operation": operation, "data_type": data_type}
    dims = {"three digits": 12, "unused digit": 12} if operation == "concat" else {}
    if operation == "path":
        fields["path_hidden"] = 1
    collection = collection_of([sequence_table(SPECS[spec], embedding_dim=dims.get(spec, 8), **fields)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in collection.parameters():
            weight.copy_(torch.randint(-1, 3, weight.shape, generator=generator))
    return collection


def users_of_integers(count: int, dim: int) -> Tensor:
    return torch.randint(-2, 3, (count, dim), generator=torch.Generator().manual_seed(count)).float()


def best_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest scores, and their ids, where equal scores stay in the order of ids."""
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


@pytest.mark.parametrize(("spec", "operation"), CASES)
def test_equal_scores_are_in_the_order_of_ids(spec: str, operation: str) -> None:
    collection = collection_of_integers(spec, operation)
    rows = materialize(collection, "t")
    for count, k in ((70, 10), (2, 500), (1, S)):
        users = users_of_integers(count, rows.shape[1])
        dense = users @ rows.T
        assert torch.equal(score_all(collection, "t", users), dense)
        out = torch.full_like(dense, torch.nan)
        assert score_all(collection, "t", users, out=out) is out
        assert torch.equal(out, dense)
        best = top_items(collection, "t", users, k)
        values, ids = best_of(dense, k)
        assert torch.equal(best.scores, values)
        assert torch.equal(best.ids, ids)


def test_plain_tables_and_half_precision() -> None:
    users = users_of_integers(20, 8)
    for pooled in (True, False):
        plain = collection_of([plain_table(pooled, num_embeddings=S), plain_table(pooled, name="other")])
        randomize(plain, seed=0)
        dense = users @ materialize(plain, "t").T
        torch.testing.assert_close(score_all(plain, "t", users), dense, rtol=1e-5, atol=1e-5)
        best = top_items(plain, "t", users, 5)
        torch.testing.assert_close(best.scores, dense.topk(5).values)
        assert torch.equal(best.ids, dense.topk(5).indices)
    for data_type in (DataType.FP16, DataType.BF16):
        for operation in ("mult", "add", "concat"):
            half = collection_of_integers("strided", operation, data_type)
            dense = users @ materialize(half, "t").T
            for dtype in (torch.float64, torch.bfloat16):
                scores = score_all(half, "t", users.to(dtype))
                assert scores.dtype == torch.float32
                assert torch.equal(scores, dense)


def test_no_users_and_no_gradient() -> None:
    for spec, operation in CASES:
        collection = collection_of_integers(spec, operation)
        dim = collection.embedding_dim()
        assert score_all(collection, "t", torch.empty(0, dim)).shape == (0, S)
        best = top_items(collection, "t", torch.empty(0, dim), 3)
        assert (best.scores.shape, best.ids.shape) == ((0, 3), (0, 3))
        users = torch.ones(2, dim, requires_grad=True)
        assert not score_all(collection, "t", users).requires_grad
        assert not top_items(collection, "t", users, 3).scores.requires_grad


class LargestResult(TorchDispatchMode):
    """Notes the number of elements of the largest tensor, of one type or of any, that an operator returns."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.elements, self.dtype = 0, dtype

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and self.dtype in (None, tensor.dtype):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("operation", ["mult", "add", "concat", "path"])
@pytest.mark.parametrize("spec", ["strided", "adjacent", "coprime"])
def test_no_tensor_has_all_scores_or_all_full_rows(spec: str, operation: str) -> None:
    num_ids, dim = 200_000, 32
    hidden = 1 if operation == "path" else None
    fields = {"num_embeddings": num_ids, "embedding_dim": dim, "operation": operation, "path_hidden": hidden}
    table = sequence_table(SPECS[spec], **fields)
    collection = collection_of([table])
    stored = max(weight.numel() for weight in collection.parameters())
    full = materialize(collection, "t")
    for count in (1, 24):
        users = users_of(count, dim)
        with LargestResult() as largest:
            best = top_items(collection, "t", users, 7)
        of_rows = sum(size * count for size in table.bound_partitions.sizes)
        most = max(2**21, stored, of_rows)
        assert largest.elements <= most < num_ids * dim
        assert count == 1 or most < num_ids * count
        torch.testing.assert_close(best.scores, (users @ full.T).topk(7).values)


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
@pytest.mark.parametrize("spec", ["strided", "no collisions"])
def test_no_copy_of_a_table_in_half_precision_is_as_large_as_the_table(spec: str, data_type: DataType) -> None:
    num_ids, dim = 100_000, 64
    table = sequence_table(SPECS[spec], num_embeddings=num_ids, embedding_dim=dim, data_type=data_type)
    collection = collection_of([table])
    with LargestResult(torch.float32) as largest:
        best = top_items(collection, "t", users_of(1, dim), 7)
    assert largest.elements <= 2**20 < num_ids * dim
    torch.testing.assert_close(best.scores, (users_of(1, dim) @ materialize(collection, "t").T).topk(7).values)


def test_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text()
    (example,) = re.findall(r"<!-- A test runs this\. -->\n```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "scoring.md", "exec"), {})


def test_bad_input_is_named() -> None:
    collection = collection_of_integers("strided", "mult")
    users = torch.ones(2, 8)
    for k in (0, -1, S + 1, 2.0):
        with pytest.raises(
            ValueError, match=rf"table 't': k={k}; allowed: an integer from 1 to {S}, the number of ids"
        ):
            top_items(collection, "t", users, k)  # type: ignore[arg-type]
    for out in (torch.empty(2, 5), torch.empty(2, S).double(), torch.empty(S, 2).T, torch.empty(2, S, device="meta")):
        with pytest.raises(ValueError, match=rf"'t': out is .*; allowed: contiguous \(2, {S}\), torch.float32, on"):
            score_all(collection, "t", users, out=out)
    for function in (score_all, lambda *given: top_items(*given, 3)):
        with pytest.raises(ValueError, match="table 'u' is not in the collection; allowed: t"):
            function(collection, "u", users)
        for shape in ((8,), (2, 7), (1, 2, 8)):
            with pytest.raises(ValueError, match=r"table 't': user_vectors have shape \(.*\); allowed: \(B, 8\)"):
                function(collection, "t", torch.ones(shape))
        with pytest.raises(TypeError, match=r"table 't': user_vectors are torch.int64; allowed: a tensor of floats"):
            function(collection, "t", users.long())
        with pytest.raises(TypeError, match=r"table 't': user_vectors are list; allowed: a tensor of floats"):
            function(collection, "t", users.tolist())
        with pytest.raises(
            ValueError, match="table 't': user_vectors are on meta; allowed: cpu, the device of the coll"
        ):
            function(collection, "t", users.to("meta"))
        with pytest.raises(TypeError, match="Linear is no float collection of torchrec_qr"):
            function(torch.nn.Linear(1, 1), "t", users)


def test_a_score_that_is_nan_is_an_error_with_its_block() -> None:
    for operation in ("mult", "add"):
        collection = collection_of_integers("strided", operation)
        with torch.no_grad():
            collection.embeddings["t"].partition_1.weight[150, 0] = torch.nan
        users = torch.ones(60, 8)
        with pytest.raises(ValueError, match=r"table 't': a score of ids \d+ to \d+ is NaN; allowed: numbers"):
            top_items(collection, "t", users, 3)
        assert int(score_all(collection, "t", users).isnan().sum()) == 60 * (174 if operation else 0)


def test_a_table_that_hashes_its_ids_scores_given_ones() -> None:
    hashed = collection_of([sequence_table(QuotientRemainder(num_collisions=4), id_hash="splitmix64")])
    for call in (lambda: score_all(hashed, "t", torch.ones(2, 8)), lambda: top_items(hashed, "t", torch.ones(2, 8), 3)):
        with pytest.raises(NotImplementedError, match="table 't': scores of all items are not supported with id_hash"):
            call()
    assert (torch.ones(2, 8) @ materialize(hashed, "t", [-5, 2**62]).T).shape == (2, 2)
