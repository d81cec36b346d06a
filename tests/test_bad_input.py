"""Bad input: the right type of exception, which names the table, feature or field, the value and what is allowed."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import batch
from single_tables import bag_table, collection_of, sequence_table, table_of
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, PoolingType

from benchmarks.quality.feature_generation import FeatureGenerationEmbeddingBagCollection
from torchrec_qr import (
    ChineseRemainder,
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingCollection,
    ExplicitPartitions,
    HashPartition,
    MixedRadix,
    QuotientRemainder,
)
from torchrec_qr.no_full_table import NoFullTable

S = 12
PARTITIONS = {
    "strided": QuotientRemainder(num_collisions=3),
    "adjacent": QuotientRemainder(num_collisions=3, grouping="adjacent"),
    "mixed_radix": MixedRadix(sizes=[3, 2, 2]),
    "chinese_remainder": ChineseRemainder(sizes=[4, 3]),
    "hash": HashPartition(rows=5),
    "explicit": ExplicitPartitions([[x // 4 for x in range(S)], [x % 4 for x in range(S)]]),
}


USER = {"name": "t_user", "feature_names": ["user"], "num_embeddings": S}


def config(kind: str = "strided", **fields: Any) -> CompositionalEmbeddingBagConfig:
    return bag_table(**{**USER, "partitions": PARTITIONS[kind], **fields})


def refused(error: type[Exception], *parts: str) -> Any:
    """The message holds all parts, in order."""
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


# --- ids outside [0, S) --------------------------------------------------------------------------------------------


class Lookup:
    """The embeddings of ids by a pooled or an unpooled collection with one table, plain or compositional."""

    def __init__(self, pooled: bool, kind: str | None, **fields: Any) -> None:
        self.pooled = pooled
        torch.manual_seed(0)
        self.collection = collection_of([table_of(kind and PARTITIONS[kind], pooled, **USER, **fields)])

    def __call__(self, ids: list[int]) -> torch.Tensor:
        out = self.collection(batch({"user": [[x] for x in ids]}))["user"]
        return out if self.pooled else out.values()


BAD_IDS = [-1, S, -(2**40), 2**62]


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("kind", [None, *PARTITIONS])
@pytest.mark.parametrize("pooled", [True, False])
def test_error_names_table_feature_id_and_range(pooled: bool, kind: str | None, bad: int) -> None:
    lookup = Lookup(pooled, kind)
    lookup([0, S - 1])
    with refused(IndexError, "table 't_user'", "feature 'user'", f"id {bad} is outside [0, {S})", "'clamp'", "'wrap'"):
        lookup([0, bad, 3])


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("pooled", [True, False])
def test_clamp_takes_the_nearest_id_and_wrap_the_remainder(pooled: bool, kind: str) -> None:
    clamp = Lookup(pooled, kind, out_of_range="clamp")
    assert torch.equal(clamp(BAD_IDS), clamp([0, S - 1, 0, S - 1]))
    assert not torch.equal(clamp([0]), clamp([S - 1]))
    wrap = Lookup(pooled, kind, out_of_range="wrap")
    assert [-(2**40) % S, 2**62 % S] == [8, 4]
    assert torch.equal(wrap(BAD_IDS), wrap([S - 1, 0, 8, 4]))


@pytest.mark.parametrize("kind", [k for k in PARTITIONS if k != "explicit"])
@pytest.mark.parametrize("pooled", [True, False])
def test_unchecked_closed_forms_stay_inside_their_tables(pooled: bool, kind: str) -> None:
    lookup = Lookup(pooled, kind, out_of_range="unchecked")
    # The lookup itself checks the bounds of rows on a CPU.
    assert bool(lookup(BAD_IDS).isfinite().all())


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("pooled", [True, False])
def test_unchecked_explicit_maps_raise_rather_than_read_out_of_bounds(pooled: bool, bad: int) -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        Lookup(pooled, "explicit", out_of_range="unchecked")([0, bad])


def test_a_policy_holds_for_its_own_table_alone() -> None:
    tables = [
        config(name="t_clamp", feature_names=["a"], out_of_range="clamp"),
        config(name="t_error", feature_names=["b"]),
    ]
    ebc = CompositionalEmbeddingBagCollection(tables=tables)
    ebc(batch({"a": [[S]], "b": [[0]]}))
    with refused(IndexError, "table 't_error'", "feature 'b'", f"id {S}"):
        ebc(batch({"a": [[S]], "b": [[S]]}))


def test_int32_ids_of_a_table_beyond_int32_are_checked_in_int64() -> None:
    big = 2**33
    table = config(num_embeddings=big, partitions=MixedRadix(sizes=[2**11] * 3), embedding_dim=4, out_of_range="wrap")
    ebc = CompositionalEmbeddingBagCollection(tables=[table])
    ids = torch.tensor([-1], dtype=torch.int32)
    out = ebc(KeyedJaggedTensor(["user"], ids, lengths=torch.tensor([1])))
    assert torch.equal(out["user"], ebc(batch({"user": [[big - 1]]}))["user"])


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.bool])
def test_ids_of_another_dtype(dtype: torch.dtype) -> None:
    # KeyedJaggedTensor itself takes values of any dtype.
    kjt = KeyedJaggedTensor(["user"], torch.tensor([0, 1]).to(dtype), lengths=torch.tensor([2]))
    with refused(TypeError, "table 't_user'", "feature 'user'", str(dtype), "int32, int64"):
        CompositionalEmbeddingBagCollection(tables=[config()])(kjt)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("kind", [None, "strided"])
def test_a_feature_that_the_batch_lacks(pooled: bool, kind: str | None) -> None:
    lookup = Lookup(pooled, kind)
    with refused(KeyError, "table 't_user'", "feature 'user'", "['item', 'country']"):
        lookup.collection(batch({"item": [[0]], "country": [[1]]}))
    with refused(KeyError, "feature 'user'"):
        lookup.collection(batch({"item": [], "country": []}))


def test_a_weighted_collection_needs_one_weight_per_id() -> None:
    ebc = CompositionalEmbeddingBagCollection(tables=[config()], is_weighted=True)
    with refused(ValueError, "weighted collection", "without weights", "['user']"):
        ebc(batch({"user": [[0, 1], [2]]}))
    for wrong in (2, 4, 1):
        with refused(ValueError, "['user']", f"{wrong} weights for 3 ids", "one weight per id"):
            ebc(batch({"user": [[0, 1], [2]]}, torch.ones(wrong)))


@pytest.mark.parametrize("operation", ["mult", "add", "concat", "path"])
def test_an_unweighted_collection_ignores_weights(operation: str) -> None:
    ebc = CompositionalEmbeddingBagCollection(tables=[config(operation=operation)])
    bags = {"user": [[0, 1], [2]]}
    assert torch.equal(ebc(batch(bags, torch.tensor([5.0, 0.0, -1.0])))["user"], ebc(batch(bags))["user"])


# --- partitions ----------------------------------------------------------------------------------------------------


def test_sizes_of_one_row_are_allowed() -> None:
    for partitions in (MixedRadix(sizes=[1, S]), ChineseRemainder(sizes=[S, 1]), QuotientRemainder(num_collisions=1)):
        table = config(partitions=partitions, operation="add")
        ebc = CompositionalEmbeddingBagCollection(tables=[table])
        main = table.bound_partitions.main
        weights = [p.detach() for p in ebc.parameters()]
        assert weights[1 - main].shape == (1, 8)
        assert torch.equal(ebc(batch({"user": [[7]]}))["user"], weights[main][7:8] + weights[1 - main])


# --- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, 4, "quotient_remainder", QuotientRemainder, QuotientRemainder(rows=7).bind(S)])
def test_partitions_that_are_no_spec(given: Any) -> None:
    with refused(TypeError, "table 't_user'", f"partitions={given!r}", "QuotientRemainder(num_collisions=4)"):
        config(partitions=given)


@pytest.mark.parametrize(
    ("spec", "error", "parts"),
    [
        (QuotientRemainder(num_collisions=13), ValueError, ["num_collisions", "between 1 and 12", "got 13"]),
        (QuotientRemainder(num_collisions="3"), TypeError, ["num_collisions must be an int", "'3'"]),  # type: ignore[arg-type]
        (ExplicitPartitions([list(range(13))]), ValueError, ["num_embeddings must be 13", "classes", "got 12"]),
    ],
)
def test_a_config_checks_its_spec_and_names_the_table(spec: Any, error: type[Exception], parts: list[str]) -> None:
    with refused(error, "table 't_user'", type(spec).__name__, *parts):
        config(partitions=spec)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"operation": "mul"}, ["operation='mul'", "mult, add, concat, path"]),
        ({"init": "zeros"}, ["init='zeros'", "unit, identity, balanced"]),
        ({"out_of_range": "ignore"}, ["out_of_range='ignore'", "error, clamp, wrap, unchecked"]),
        ({"path_activation": "gelu", "operation": "path"}, ["path_activation='gelu'", "relu, tanh"]),
        ({"pooling": PoolingType.NONE}, ["pooling=", "NONE", "SUM", "MEAN"]),
        ({"data_type": DataType.INT8}, ["data_type=", "INT8", "FP32", "FP16", "BF16"]),
        ({"feature_names": ["user", "user"]}, ["feature_names=['user', 'user']", "each feature once"]),
        ({"embedding_dim": 0}, ["embedding_dim=0", "positive multiples of 4 up to 1024"]),
        ({"embedding_dim": -4}, ["embedding_dim=-4", "positive multiples of 4"]),
        ({"embedding_dim": 6}, ["embedding_dim=6", "positive multiples of 4"]),
        ({"embedding_dim": 1028}, ["embedding_dim=1028", "up to 1024"]),
        ({"embedding_dim": 8.0}, ["embedding_dim=8.0", "positive multiples of 4"]),
        ({"embedding_dim": [8]}, ["embedding_dim=[8]", "positive multiples of 4"]),
        ({"embedding_dim": 4, "operation": "concat"}, ["embedding_dim=4", "at least 8, 4 for each of 2 partitions"]),
        ({"partition_dims": [4, 4]}, ["partition_dims=[4, 4]", "None, except under operation='concat'"]),
        (
            {"partition_dims": [4, 4], "operation": "path"},
            ["partition_dims=[4, 4]", "None, except under operation='concat'"],
        ),
        (
            {"partition_dims": [4, 8], "operation": "concat"},
            ["partition_dims=[4, 8]", "a sum equal to embedding_dim=8"],
        ),
        ({"partition_dims": [8], "operation": "concat"}, ["partition_dims=[8]", "one for each of the 2 partitions"]),
        ({"partition_dims": [4, 2, 2], "operation": "concat"}, ["partition_dims=[4, 2, 2]", "of the 2 partitions"]),
        ({"partition_dims": [6, 2], "operation": "concat"}, ["partition_dims=[6, 2]", "positive multiples of 4"]),
        ({"partition_dims": [8, 0], "operation": "concat"}, ["partition_dims=[8, 0]", "positive multiples of 4"]),
        ({"partition_dims": ["4", "4"], "operation": "concat"}, ["partition_dims=['4', '4']", "positive multiples"]),
        ({"partition_dims": 8, "operation": "concat"}, ["partition_dims=8", "one for each of the 2 partitions"]),
        (
            {"partition_dims": [1028, 4], "operation": "concat", "embedding_dim": 1032},
            ["partition_dims=[1028, 4]", "up to 1024"],
        ),
        ({"path_hidden": 8}, ["path_hidden=8", "None, except under operation='path'"]),
        ({"path_hidden": 0, "operation": "path"}, ["path_hidden=0", "a width of at least 1"]),
        ({"path_hidden": 2.5, "operation": "path"}, ["path_hidden=2.5", "a width of at least 1"]),
        ({"init_fn": [torch.nn.init.ones_]}, ["init_fn=", "one for each of the 2 partitions"]),
        ({"weight_init_min": 1.0, "weight_init_max": 1.0}, ["weight_init_max=1.0", "above weight_init_min=1.0"]),
        (
            {"weight_init_min": 0.0, "weight_init_max": 1.0, "init": "balanced"},
            ["weight_init_max=1.0", "-weight_init_min", "init='balanced'"],
        ),
    ],
    # Leave out addresses, because processes of pytest-xdist must agree on the names of tests.
    ids=lambda given: re.sub(r" at 0x\w+", "", str(given)),
)
def test_configs(fields: dict[str, Any], parts: list[str]) -> None:
    with refused(ValueError, "table 't_user'", *parts):
        config(**fields)
    if "pooling" not in fields:
        with refused(ValueError, "table 't_user'", *parts):
            sequence_table(PARTITIONS["strided"], **USER | fields)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("num_embeddings_post_pruning", 5),
        ("need_pos", True),
        ("input_dim", 24),
        ("total_num_buckets", 4),
        ("use_virtual_table", True),
    ],
)
def test_torchrec_fields_without_a_meaning_for_partitions(field: str, given: object) -> None:
    assert field in BaseEmbeddingConfig.__dataclass_fields__
    with refused(NotImplementedError, "table 't_user'", f"{field}={given!r}", "not supported by a compositional table"):
        config(**{field: given})


# --- collections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [config(), EmbeddingBagConfig(name="t_user", num_embeddings=5, embedding_dim=4)])
def test_a_table_name_that_occurs_twice(second: EmbeddingBagConfig) -> None:
    with refused(ValueError, "table 't_user'", "occurs twice"):
        CompositionalEmbeddingBagCollection(tables=[config(), second])


@pytest.mark.parametrize("name", ["half", "training", "keys", "a.b", "", 3])
def test_a_table_name_that_torch_refuses_for_a_module(name: Any) -> None:
    for given in (config(name=name), EmbeddingBagConfig(name=name, num_embeddings=5, embedding_dim=4)):
        with refused(ValueError, f"table {name!r}", "allowed: a string without a dot", "torch.nn.ModuleDict"):
            CompositionalEmbeddingBagCollection(tables=[given])


def test_plain_tables_of_what_is_not_supported() -> None:
    common: dict[str, Any] = {"name": "t_plain", "num_embeddings": 5, "embedding_dim": 4, "feature_names": ["f"]}
    with refused(ValueError, "table 't_plain'", "data_type", "INT8", "FP32"):
        CompositionalEmbeddingBagCollection(tables=[EmbeddingBagConfig(**common, data_type=DataType.INT8)])
    with refused(ValueError, "table 't_plain'", "data_type", "INT8", "FP32"):
        CompositionalEmbeddingCollection(tables=[EmbeddingConfig(**common, data_type=DataType.INT8)])
    with refused(ValueError, "table 't_plain'", "pooling", "NONE", "SUM"):
        CompositionalEmbeddingBagCollection(tables=[EmbeddingBagConfig(**common, pooling=PoolingType.NONE)])


@pytest.mark.parametrize("operation", ["add", "concat", "path"])
def test_feature_generation_of_another_operation(operation: str) -> None:
    with refused(ValueError, "table 't_user'", f"operation={operation!r}", "'mult'"):
        FeatureGenerationEmbeddingBagCollection(tables=[config(operation=operation)])


def test_sequence_tables_of_different_dims_have_no_common_dim() -> None:
    tables = [
        EmbeddingConfig(name="a", num_embeddings=5, embedding_dim=4, feature_names=["a"]),
        EmbeddingConfig(name="b", num_embeddings=5, embedding_dim=8, feature_names=["b"]),
    ]
    with refused(ValueError, "embedding_dim", "{'a': 4, 'b': 8}", "one dimension"):
        CompositionalEmbeddingCollection(tables=tables).embedding_dim()


def test_the_limit_of_a_row_is_one_of_what_is_stored() -> None:
    """Rows of ``concat`` are split over the partitions, so that the whole may be wider than FBGEMM's limit."""
    assert config(operation="concat", embedding_dim=2048).partition_columns == (1024, 1024)
    with refused(ValueError, "table 't_user': embedding_dim=2052; allowed: ", " up to 2048"):
        config(operation="concat", embedding_dim=2052)


@pytest.mark.parametrize("pooled", [True, False])
def test_two_outputs_of_one_name_are_refused(pooled: bool) -> None:
    spec = PARTITIONS["strided"]
    for features in (["u", "u@b"], ["u@b", "u"]):
        tables = [
            table_of(spec, pooled, name="a", num_embeddings=S, feature_names=features),
            table_of(None, pooled, name="b", num_embeddings=S, feature_names=["u"]),
        ]
        with refused(ValueError, "table 'b': feature 'u' has the output 'u@b', as feature 'u@b' of table 'a' has"):
            collection_of(tables)


@pytest.mark.parametrize(
    ("collection", "config", "device"),
    [
        (EmbeddingBagCollection, bag_table, "cpu"),
        (EmbeddingCollection, sequence_table, "cpu"),
        (EmbeddingCollection, sequence_table, "meta"),
    ],
)
def test_a_collection_of_torchrec_stores_no_full_rows_of_a_compositional_table(
    collection: type, config: Callable[..., Any], device: str
) -> None:
    table = config(QuotientRemainder(num_collisions=4), name="t_user", num_embeddings=40, embedding_dim=8)
    with pytest.raises(TypeError, match="table 't_user': a collection of TorchRec would store all its rows"):
        collection(tables=[table], device=torch.device(device))
    assert replace(table, name="t_item").init_fn == NoFullTable("t_item")


@pytest.mark.parametrize("partitions", [None, QuotientRemainder(num_collisions=4)], ids=["plain", "compositional"])
def test_a_table_of_the_other_kind_of_collection_is_refused(partitions: QuotientRemainder | None) -> None:
    """TorchRec's fail for a lack of the attribute; a table that is taken would be pooled in a way that nobody chose."""
    bag, sequence = (table_of(partitions, pooled, name="t_user") for pooled in (True, False))
    with refused(
        TypeError, "table 't_user': ", "EmbeddingConfig in a collection of bags; allowed: EmbeddingBagConfig, "
    ):
        CompositionalEmbeddingBagCollection(tables=[sequence])
    with refused(TypeError, "table 't_user': ", "BagConfig in a collection of sequences; allowed: EmbeddingConfig, "):
        CompositionalEmbeddingCollection(tables=[bag])
