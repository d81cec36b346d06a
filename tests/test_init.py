"""Initial values: the composed embedding has the moments of the full table, 0 and 1/(3S)."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from batches import batch
from single_tables import bag_table, sequence_table
from torch import Tensor
from torchrec import EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType

from benchmarks.quality.feature_generation import FeatureGenerationEmbeddingBagCollection
from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingCollection,
    HashPartition,
    MixedRadix,
    QuotientRemainder,
)
from torchrec_qr.init import init_partition
from torchrec_qr.modules.table import CompositionalTable, init_tables
from torchrec_qr.ops.arguments import Batch
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.feature_lookup import look_up_features
from torchrec_qr.partitions import PartitionSpec

SEEDS = 64


config = partial(bag_table, num_embeddings=10_000)


class Moments:
    """Mean and second moment of all tensors added."""

    def __init__(self) -> None:
        self.n, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        values = values.detach().double()
        self.n += values.numel()
        self.total += float(values.sum())
        self.squares += float(values.square().sum())

    @property
    def mean(self) -> float:
        return self.total / self.n

    @property
    def variance(self) -> float:
        return self.squares / self.n - self.mean**2


def embed(table: CompositionalTable, ids: Tensor) -> Tensor:
    """Returns the embedding of each id (N, D), through the module's lookup."""
    starts = [0, len(ids)]
    maps = [] if table.class_map is None else [table.class_map]
    tables, batch = Description([table.layout], ["t"], maps), Batch(ids, torch.tensor(starts), None, False, starts)
    (out,) = look_up_features(tables, list(table.weights()), batch)
    return out


def drawn(table_config: CompositionalEmbeddingBagConfig, seed: int = 0) -> CompositionalTable:
    table = CompositionalTable(table_config, torch.device("cpu"))
    torch.manual_seed(seed)
    init_tables(table)
    return table


def sampled(table_config: CompositionalEmbeddingBagConfig, ids: Tensor) -> tuple[Moments, list[Moments]]:
    """Over `SEEDS` draws: moments of the embeddings of ``ids``, through the module's lookup, and of each partition."""
    composed, parts = Moments(), [Moments() for _ in table_config.bound_partitions.sizes]
    for seed in range(SEEDS):
        table = drawn(table_config, seed)
        with torch.no_grad():
            composed.add(embed(table, ids))
        for moments, weight in zip(parts, table.weights(), strict=True):
            moments.add(weight)
    return composed, parts


def ids_of(num_ids: int, count: int) -> Tensor:
    return torch.randint(num_ids, (count,), generator=torch.Generator().manual_seed(0))


SHAPES = {
    "S=1e4, K=2, balanced": (QuotientRemainder(balanced=True), 10_000, 32),
    "S=1e4, K=3, balanced": (MixedRadix(balanced=True, num_partitions=3), 10_000, 64),
    "S=1e5, K=2, 4x": (QuotientRemainder(compression=4.0), 100_000, 8),
    "S=1e6, K=2, balanced, adjacent": (QuotientRemainder(balanced=True, grouping="adjacent"), 1_000_000, 8),
    "S=1e6, K=3, balanced": (MixedRadix(balanced=True, num_partitions=3), 1_000_000, 16),
}


@pytest.mark.parametrize(
    ("shape", "data_type"),
    [(s, DataType.FP32) for s in SHAPES]
    + [(s, DataType.BF16) for s in ("S=1e4, K=2, balanced", "S=1e6, K=3, balanced")],
)
@pytest.mark.parametrize("init", ["unit", "identity", "balanced"])
@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_composed_moments_are_those_of_the_full_table(
    shape: str, operation: str, init: str, data_type: DataType
) -> None:
    spec, num_ids, dim = SHAPES[shape]
    table = config(spec, num_embeddings=num_ids, embedding_dim=dim, operation=operation, init=init, data_type=data_type)
    partitions = table.bound_partitions
    variance = 1 / (3 * num_ids)
    composed, parts = sampled(table, ids_of(num_ids, 2048))
    assert composed.variance == pytest.approx(variance, rel=0.05)

    # Independent draws behind the composed mean: those of the partition with fewest rows that carries the variance.
    all_carry = init == "balanced" or operation == "concat" or (init, operation) == ("unit", "mult")
    rows = min(partitions.sizes) if all_carry else partitions.sizes[partitions.main]
    columns = min(table.partition_columns)
    assert abs(composed.mean) < 3 * math.sqrt(variance / (min(rows, 2048) * columns * SEEDS))

    for j, part in enumerate(parts):
        mean, expected = expected_moments(operation, init, j == partitions.main, partitions.num_partitions, variance)
        assert part.variance == pytest.approx(expected, rel=0.05), f"partition {j}"
        assert abs(part.mean - mean) < 3 * math.sqrt(expected / part.n), f"partition {j}"


def expected_moments(operation: str, init: str, main: bool, k: int, variance: float) -> tuple[float, float]:
    """Returns the mean and the variance of a partition's entries."""
    if operation == "concat" or (init != "balanced" and main):
        return 0, variance
    if (init, operation) == ("unit", "mult"):
        return 0, 1
    if init == "balanced":
        return 0, variance ** (1 / k) if operation == "mult" else variance / k
    return (1, 1e-4) if operation == "mult" else (0, 1e-4 * variance)


@pytest.mark.parametrize(
    ("partitions", "hidden", "activation", "data_type"),
    [
        (QuotientRemainder(balanced=True), None, "relu", DataType.FP32),
        (QuotientRemainder(balanced=True), 8, "relu", DataType.FP32),
        (QuotientRemainder(balanced=True), 8, "tanh", DataType.FP32),
        (QuotientRemainder(balanced=True), 1, "relu", DataType.BF16),
        (MixedRadix(balanced=True, num_partitions=3), None, "relu", DataType.BF16),
        (MixedRadix(balanced=True, num_partitions=3), 8, "relu", DataType.FP32),
    ],
)
def test_path_has_the_moments_of_the_full_table(
    partitions: PartitionSpec, hidden: int | None, activation: str, data_type: DataType
) -> None:
    table = config(partitions, operation="path", path_hidden=hidden, path_activation=activation, data_type=data_type)
    variance = 1 / 30_000
    composed, parts = sampled(table, ids_of(10_000, 256))
    assert composed.variance == pytest.approx(variance, rel=0.1)
    assert abs(composed.mean) < 3 * math.sqrt(variance / (min(table.bound_partitions.sizes) * 8 * SEEDS))
    assert parts[0].variance == pytest.approx(variance, rel=0.05)


def test_the_hidden_layer_of_a_path_starts_as_nn_linear() -> None:
    dim, hidden = 8, 16
    table = drawn(config(QuotientRemainder(balanced=True), operation="path", path_hidden=hidden))
    first_layer = table.weights()[1].detach()[:, : hidden * dim + hidden]
    bound = 1 / math.sqrt(dim)  # nn.Linear: weight and bias alike
    assert 0.999 * bound < float(first_layer.abs().max()) <= bound
    assert float(first_layer.var()) == pytest.approx(bound**2 / 3, rel=0.05)


def test_hashing_starts_as_the_full_table_in_every_mode() -> None:
    for init in ("unit", "identity", "balanced"):
        composed, _ = sampled(config(HashPartition(rows=100), init=init), ids_of(10_000, 512))
        assert composed.variance == pytest.approx(1 / 30_000, rel=0.05)


def of_one_main_row(**fields: Any) -> Tensor:
    table = drawn(config(QuotientRemainder(num_collisions=4), embedding_dim=1024, **fields))
    return embed(table, torch.tensor([7, 2507, 5007])).detach()  # 2500 main rows


def test_ids_of_one_main_row_start_nearly_alike_under_identity() -> None:
    rows = of_one_main_row(init="identity")
    assert not torch.equal(rows[0], rows[1])
    torch.testing.assert_close(rows[1:], rows[:1].expand(2, -1), rtol=0.1, atol=0)


@pytest.mark.parametrize("init", ["unit", "balanced"])
def test_ids_of_one_main_row_start_uncorrelated_otherwise(init: str) -> None:
    correlations = torch.corrcoef(of_one_main_row(init=init))
    assert float((correlations - torch.eye(3)).abs().max()) < 4 / math.sqrt(1024)


def test_unit_is_the_default() -> None:
    assert torch.equal(of_one_main_row(), of_one_main_row(init="unit"))
    assert not torch.equal(of_one_main_row(), of_one_main_row(init="identity"))


ALL = [
    {"operation": "mult"},
    {"operation": "mult", "init": "identity"},
    {"operation": "mult", "init": "balanced"},
    {"operation": "add"},
    {"operation": "concat"},
    {"operation": "path"},
    {"operation": "path", "path_hidden": 4},
]


def values(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("fields", ALL, ids=str)
def test_a_seed_gives_the_same_values_however_the_module_is_built(fields: dict[str, Any]) -> None:
    def tables() -> list[EmbeddingBagConfig]:
        plain = EmbeddingBagConfig(name="plain", num_embeddings=9, embedding_dim=4, feature_names=["g"])
        return [config(QuotientRemainder(num_collisions=30), num_embeddings=1000, **fields), plain]

    torch.manual_seed(7)
    built = CompositionalEmbeddingBagCollection(tables=tables())
    expected = values(built)

    torch.manual_seed(7)
    assert all(map(torch.equal, values(CompositionalEmbeddingBagCollection(tables=tables())), expected))

    torch.manual_seed(7)
    built.reset_parameters()
    assert all(map(torch.equal, values(built), expected))

    torch.manual_seed(8)
    built.reset_parameters()
    assert not any(map(torch.equal, values(built), expected))

    meta = CompositionalEmbeddingBagCollection(tables=tables(), device=torch.device("meta"))
    meta.to_empty(device="cpu")
    assert meta.device.type == "cpu"
    torch.manual_seed(7)
    meta.reset_parameters()
    assert all(map(torch.equal, values(meta), expected))
    name = "embedding_bags.t.fingerprint"
    assert torch.equal(meta.state_dict()[name], built.state_dict()[name])


@pytest.mark.parametrize("fields", ALL, ids=str)
def test_sequences_start_as_bags_do(fields: dict[str, Any]) -> None:
    partitions = QuotientRemainder(num_collisions=30)
    torch.manual_seed(7)
    bags = CompositionalEmbeddingBagCollection(tables=[config(partitions, num_embeddings=1000, **fields)])
    torch.manual_seed(7)
    sequences = CompositionalEmbeddingCollection(tables=[sequence_table(partitions, num_embeddings=1000, **fields)])
    assert all(map(torch.equal, values(sequences), values(bags)))


def test_one_init_fn_fills_all_partitions_and_a_list_one_each() -> None:
    same = CompositionalEmbeddingBagCollection(
        tables=[config(QuotientRemainder(num_collisions=7), num_embeddings=100, init_fn=torch.nn.init.ones_)]
    )
    assert [w.unique().tolist() for w in values(same)] == [[1.0], [1.0]]

    def halves(w: Tensor) -> Tensor:
        return torch.nn.init.constant_(w, 0.5)

    def threes(w: Tensor) -> None:
        torch.nn.init.constant_(w, 3.0)

    each = CompositionalEmbeddingBagCollection(
        tables=[config(QuotientRemainder(num_collisions=7), num_embeddings=100, init_fn=[halves, threes])]
    )
    assert [w.unique().tolist() for w in values(each)] == [[0.5], [3.0]]
    assert each(batch({"f": [[0, 99]]}))["f"].tolist() == [[3.0] * 8]


@pytest.mark.parametrize("operation", ["mult", "add", "concat", "path"])
def test_weight_init_bounds_replace_the_full_tables(operation: str) -> None:
    partitions = QuotientRemainder(balanced=True)
    table = config(partitions, operation=operation, weight_init_min=0.5, weight_init_max=2.0)
    torch.manual_seed(0)
    weights = values(CompositionalEmbeddingBagCollection(tables=[table]))
    for j in (0, 1) if operation == "concat" else (0,):
        low, high = float(weights[j].min()), float(weights[j].max())
        assert 0.5 <= low < 0.55
        assert 1.95 < high <= 2.0


def test_weight_init_bounds_scale_the_balanced_mode() -> None:
    partitions = QuotientRemainder(balanced=True)
    for operation in ("mult", "add"):
        table = config(
            partitions,
            operation=operation,
            init="balanced",
            weight_init_min=-0.3,
            weight_init_max=0.3,
            embedding_dim=32,
        )
        composed, _ = sampled(table, ids_of(10_000, 1024))
        assert composed.variance == pytest.approx(0.03, rel=0.05)


def test_low_precision_storage_keeps_the_noise_around_one_in_fp32() -> None:
    for data_type, dtype in ((DataType.FP16, torch.float16), (DataType.BF16, torch.bfloat16)):
        main, other = drawn(config(QuotientRemainder(num_collisions=100), data_type=data_type)).weights()
        assert (main.dtype, other.dtype) == (dtype, torch.float32)
        # 1 + N(0, 0.01²) has a few dozen values in bf16.
        assert other.unique().numel() > 0.9 * other.numel()


def test_rows_beyond_one_chunk_are_drawn_too() -> None:
    table = config(QuotientRemainder(num_collisions=1), num_embeddings=1_300_000, embedding_dim=4)
    weight = torch.full((1_300_000, 4), math.nan)
    init_partition(table, 0, weight)
    bound = 1 / math.sqrt(1_300_000)
    assert float(weight.abs().max()) <= bound  # NaN compares false
    assert float(weight[-100_000:].double().var()) == pytest.approx(bound**2 / 3, rel=0.05)


def test_generated_features_start_as_plain_tables_of_their_rows() -> None:
    partitions = QuotientRemainder(num_collisions=40)
    torch.manual_seed(0)
    ebc = FeatureGenerationEmbeddingBagCollection(tables=[config(partitions, embedding_dim=256)])
    for rows, weight in zip(partitions.bind(10_000).sizes, ebc.parameters(), strict=True):
        assert float(weight.detach().double().square().mean()) == pytest.approx(1 / (3 * rows), rel=0.05)
