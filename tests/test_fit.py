"""Partitions fitted to full tables, against NumPy's least squares of the dense design matrix and known products."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType

from torchrec_qr import (
    ChineseRemainder,
    CompositionalEmbeddingConfig,
    ExplicitPartitions,
    HashPartition,
    MixedRadix,
    QuotientRemainder,
)
from torchrec_qr.compression import fit, full_table
from torchrec_qr.compression.fit import Fit, fitted
from torchrec_qr.compression.fit_add import fit_add
from torchrec_qr.compression.full_table import FullTable
from torchrec_qr.partitions import PartitionSpec

S, D = 203, 8
_SHUFFLED = torch.randperm(S, generator=torch.Generator().manual_seed(7))

# S = 203 leaves the last quotients incomplete. The explicit maps are unbalanced, and a class 3 has no ids.
SPECS: dict[str, PartitionSpec] = {
    "strided": QuotientRemainder(num_collisions=4),
    "adjacent": QuotientRemainder(num_collisions=4, grouping="adjacent"),
    "balanced": QuotientRemainder(balanced=True),
    "three digits": MixedRadix(balanced=True, num_partitions=3),
    "remainders": ChineseRemainder(balanced=True, num_partitions=3),
    "few pairs": ChineseRemainder(sizes=[40, 41]),
    "hash": HashPartition(rows=17),
    "explicit": ExplicitPartitions(
        torch.stack([_SHUFFLED // 9 + (_SHUFFLED > 30), _SHUFFLED % 9 + 9 * (_SHUFFLED % 2)])
    ),
    "apart": ExplicitPartitions(torch.stack([_SHUFFLED % 20 + 20 * (_SHUFFLED // 100), _SHUFFLED // 20])),
}
FREQUENCIES = {
    "alike": None,
    "zipf": 1 / (1 + torch.arange(S)),
    "some never": torch.randint(0, 3, (S,), generator=torch.Generator().manual_seed(8)),
}


def config_of(partitions: PartitionSpec, operation: Any, **fields: Any) -> CompositionalEmbeddingConfig:
    given = {"name": "t", "feature_names": ["f"], "num_embeddings": S, "embedding_dim": D, **fields}
    return CompositionalEmbeddingConfig(partitions=partitions, operation=operation, **given)


def composed(config: CompositionalEmbeddingConfig, rows: list[Tensor]) -> npt.NDArray[np.float64]:
    """The embeddings of all ids, by NumPy."""
    classes = config.bound_partitions.rows(torch.arange(config.num_embeddings)).numpy()
    parts = [r.double().numpy()[classes[:, j]] for j, r in enumerate(rows)]
    if config.operation == "concat":
        return np.concatenate(parts, axis=1)
    out: npt.NDArray[np.float64] = (np.prod if config.operation == "mult" else np.sum)(parts, axis=0)
    return out


def design(config: CompositionalEmbeddingConfig) -> npt.NDArray[np.float64]:
    """(S, R) with a one for each row that an id selects."""
    bound = config.bound_partitions
    classes = bound.rows(torch.arange(S)).numpy() + np.cumsum([0, *bound.sizes[:-1]])
    matrix = np.zeros((S, bound.num_rows))
    np.put_along_axis(matrix, classes, 1.0, axis=1)
    return matrix


def weights_of(frequencies: Tensor | None) -> npt.NDArray[np.float64]:
    return np.ones(S) if frequencies is None else frequencies.double().numpy()


def least(matrix: npt.NDArray[np.float64], full: Tensor, frequencies: Tensor | None) -> npt.NDArray[np.float64]:
    """The embeddings of least weighted squared error, by NumPy's least squares."""
    root = np.sqrt(weights_of(frequencies))[:, None]
    return matrix @ np.linalg.lstsq(matrix * root, full.double().numpy() * root, rcond=None)[0]


def squared_error(full: Tensor, embeddings: npt.NDArray[np.float64], frequencies: Tensor | None) -> float:
    return float((weights_of(frequencies)[:, None] * (full.double().numpy() - embeddings) ** 2).sum())


@pytest.mark.parametrize("frequencies", FREQUENCIES)
@pytest.mark.parametrize("spec", SPECS)
def test_add_is_the_least_squares_solution(spec: str, frequencies: str) -> None:
    config, weights, full = config_of(SPECS[spec], "add"), FREQUENCIES[frequencies], torch.randn(S, D).double()
    rows = fit_add(FullTable(full, config.bound_partitions, weights))
    own, expected = composed(config, rows), least(design(config), full, weights)
    counted = weights_of(weights) > 0
    np.testing.assert_allclose(own[counted], expected[counted], rtol=1e-6, atol=1e-6)
    best = squared_error(full, expected, weights)
    assert squared_error(full, own, weights) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("frequencies", FREQUENCIES)
@pytest.mark.parametrize("spec", SPECS)
def test_concat_is_the_least_squares_solution(spec: str, frequencies: str) -> None:
    config, weights = config_of(SPECS[spec], "concat", embedding_dim=12), FREQUENCIES[frequencies]
    full, bound = torch.randn(S, 12), config.bound_partitions
    own = composed(config, fitted(config, full, weights).rows)
    ends = np.cumsum([0, *config.partition_columns])
    starts = np.cumsum([0, *bound.sizes])
    counted = weights_of(weights) > 0
    for j in range(bound.num_partitions):
        matrix = design(config)[:, starts[j] : starts[j + 1]]
        expected = least(matrix, full[:, ends[j] : ends[j + 1]], weights)
        np.testing.assert_allclose(own[counted, ends[j] : ends[j + 1]], expected[counted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["strided", "adjacent", "three digits", "remainders", "explicit"])
def test_mult_finds_a_table_of_products(spec: str) -> None:
    config = config_of(SPECS[spec], "mult")
    rows = [torch.randn(size, D) for size in config.bound_partitions.sizes]
    full = torch.from_numpy(composed(config, rows)).float()
    found = fitted(config, full)
    assert found.error < 0.02
    np.testing.assert_allclose(
        np.linalg.norm(composed(config, found.rows) - full.numpy()) / np.linalg.norm(full.numpy()),
        found.error,
        rtol=1e-3,
    )
    main = config.bound_partitions.main
    for j, r in enumerate(found.rows):
        if j != main:
            torch.testing.assert_close(r.square().mean(0), torch.ones(D))


def test_mult_reaches_columns_that_cancel_within_each_main_class() -> None:
    """Two ids share a main row, and have opposite values: their mean is 0, and so is the start of one."""
    config = config_of(QuotientRemainder(num_collisions=2), "mult", num_embeddings=100)
    main, sign = torch.randn(50, D), torch.tensor([1.0, -1.0])
    ids = torch.arange(100)
    assert fitted(config, main[ids % 50] * sign[ids // 50].unsqueeze(1)).error < 1e-6


@pytest.mark.parametrize("frequencies", FREQUENCIES)
@pytest.mark.parametrize("spec", ["strided", "adjacent", "balanced", "explicit"])
def test_mult_comes_near_the_best_rank_one_of_two_partitions(spec: str, frequencies: str) -> None:
    """Each column is the nearest matrix of rank one, which the best of many random starts finds, by NumPy."""
    config, weights = config_of(SPECS[spec], "mult", embedding_dim=4), FREQUENCIES[frequencies]
    full = torch.randn(S, 4) + 0.5
    found = fitted(config, full, weights)
    generator, best = np.random.default_rng(0), np.full(4, np.inf)
    classes, (m, n) = config.bound_partitions.rows(torch.arange(S)).numpy(), config.bound_partitions.sizes
    mass, cells = np.zeros((m, n)), np.zeros((4, m, n))
    mass[classes[:, 0], classes[:, 1]] = weights_of(weights)
    cells[:, classes[:, 0], classes[:, 1]] = full.double().numpy().T
    for _ in range(20):
        v = generator.normal(size=(4, n))
        for _ in range(100):
            u = ((mass * cells) @ v[:, :, None])[:, :, 0] / np.maximum((mass @ (v**2).T).T, 1e-12)
            v = (np.swapaxes(mass * cells, 1, 2) @ u[:, :, None])[:, :, 0] / np.maximum((mass.T @ (u**2).T).T, 1e-12)
        best = np.minimum(best, (mass * (cells - u[:, :, None] * v[:, None, :]) ** 2).sum((1, 2)))
    assert squared_error(full, composed(config, found.rows), weights) < 1.05 * best.sum()


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_one_partition_takes_the_means_of_classes(operation: Any) -> None:
    config, full, weights = config_of(HashPartition(rows=17), operation), torch.randn(S, D), torch.rand(S)
    (rows,) = fitted(config, full, weights).rows
    expected = torch.stack([(full * weights.unsqueeze(1))[c::17].sum(0) / weights[c::17].sum() for c in range(17)])
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
@pytest.mark.parametrize("spec", ["strided", "three digits", "explicit"])
def test_blocks_and_groups_of_columns_change_nothing(
    spec: str, operation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, full = config_of(SPECS[spec], operation, embedding_dim=12), torch.randn(S, 12)
    whole = composed(config, fitted(config, full, FREQUENCIES["zipf"]).rows)
    monkeypatch.setattr(full_table, "_CPU_BLOCK", 12 * 7)
    in_blocks = composed(config, fitted(config, full, FREQUENCIES["zipf"]).rows)
    np.testing.assert_allclose(in_blocks, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operation", ["mult", "add"])
def test_groups_of_columns_fit_as_well(operation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, full = config_of(SPECS["strided"], operation), torch.randn(S, D)
    whole = fitted(config, full)
    monkeypatch.setattr(fit, "_LEAST_SCALARS", 1)
    assert len(fit._column_groups(config)) == 2
    in_groups = fitted(config, full)
    if operation == "add":
        np.testing.assert_allclose(composed(config, in_groups.rows), composed(config, whole.rows), atol=1e-5)
    # The random starts of mult are others.
    assert in_groups.error == pytest.approx(whole.error, rel=0.01)


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_the_error_is_that_of_the_stored_rows(operation: Any, data_type: DataType) -> None:
    config = config_of(SPECS["strided"], operation, data_type=data_type)
    full, weights = torch.randn(S, D).to(torch.float16), torch.rand(S)
    found: Fit = fitted(config, full, weights)
    assert [r.dtype for r in found.rows] == [shape.dtype for shape in config.partition_shapes]
    difference = full.double().numpy() - composed(config, found.rows)
    root = np.sqrt(weights.double().numpy())[:, None]
    assert found.error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(full.double().numpy()), rel=1e-6)
    weighted = np.linalg.norm(root * difference) / np.linalg.norm(root * full.double().numpy())
    assert found.weighted_error == pytest.approx(weighted, rel=1e-6)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_the_default_device_is_not_that_of_the_fit(operation: Any) -> None:
    config, full = config_of(SPECS["strided"], operation), torch.randn(S, D)
    with torch.device("meta"):
        found = fitted(config, full, FREQUENCIES["zipf"])
    assert {r.device.type for r in found.rows} == {"cpu"}


def test_rows_of_ids_without_frequency_fit_these_ids() -> None:
    """A main class of ids that never occur has their own fit, and no zeros."""
    config, full = config_of(QuotientRemainder(num_collisions=2), "add", num_embeddings=8), torch.randn(8, D)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    main, other = fitted(config, full, weights).rows
    expected = (full[[3, 7]] - other).mean(0)
    torch.testing.assert_close(main[3], expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_fitted_is_refused_by_name() -> None:
    config, full = config_of(SPECS["strided"], "add"), torch.randn(S, D)
    with pytest.raises(NotImplementedError, match="table 't': operation='path' cannot be fitted"):
        fitted(config_of(SPECS["strided"], "path"), full)
    with pytest.raises(ValueError, match=r"table 't': the full table has shape \(202, 8\); allowed: \(203, 8\)"):
        fitted(config, full[:-1])
    with pytest.raises(ValueError, match="table 't': the full table is on the meta device"):
        fitted(config, full.to("meta"))
    huge = full.clone()
    huge[201, 3] = 1e20
    with pytest.raises(ValueError, match=r"table 't': values up to 1\.0\d*e\+20 overflow while partitions are fitted"):
        fitted(config_of(SPECS["strided"], "mult"), huge)
    full[201, 3] = float("inf")
    with pytest.raises(ValueError, match="table 't': the full table has a value that is not finite, first at id 201"):
        fitted(config, full)


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        ([1.0] * S, "are a list"),
        (torch.ones(S - 1), r"have shape \(202,\); allowed: \(203,\)"),
        (-torch.ones(S), "the least value -1.0"),
        (torch.zeros(S), "the sum 0.0"),
        (torch.full((S,), float("nan")), "first at id 0"),
    ],
)
def test_wrong_frequencies_are_refused_by_name(frequencies: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"table 't': frequencies .*{message}"):
        fitted(config_of(SPECS["strided"], "add"), torch.randn(S, D), frequencies)
