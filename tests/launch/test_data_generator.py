"""The generator: a row depends on its position alone, ids follow their law, and the signal's best AUC is right."""

import time
from pathlib import Path

import numpy as np
import pytest

from launch.auc import auc
from launch.config import read_job
from launch.data.errors import BadRows
from launch.data.generator import GeneratedRows
from launch.data.loader import open_data
from launch.data.rows import Rows
from launch.data.source import RowSource
from launch.sections import GeneratorSection

ROWS = (50_000, 12_000, 1000, 5)
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def generated(n: int, seed: int = 0, **section: float) -> Rows:
    return RowSource([GeneratedRows(GeneratorSection(n, seed, **section), ROWS, 13)]).read(0, n, BadRows("error"))


def test_a_row_depends_on_seed_and_position_alone() -> None:
    whole = generated(10_000)
    source = RowSource([GeneratedRows(GeneratorSection(rows=10_000), ROWS, 13)])
    part = source.reopened().read(4000, 9000, BadRows("error"))
    np.testing.assert_array_equal(part.ids, whole.ids[4000:9000])
    np.testing.assert_array_equal(part.dense, whole.dense[4000:9000])
    np.testing.assert_array_equal(part.labels, whole.labels[4000:9000])
    np.testing.assert_array_equal(generated(20_000).ids[:10_000], whole.ids)
    assert (generated(10_000, seed=1).ids != whole.ids).mean() > 0.3


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.4])
def test_ids_follow_the_power_law(exponent: float) -> None:
    rows = generated(50_000, zipf=exponent)
    assert (rows.ids >= 0).all()
    assert (rows.ids < np.array(ROWS)).all()

    def below(k: int, n: int) -> float:
        if exponent == 1:
            return float(np.log(k + 1) / np.log(n + 1))
        return float(((k + 1) ** (1 - exponent) - 1) / ((n + 1) ** (1 - exponent) - 1))

    for f, n in enumerate(ROWS):
        for k in (1, 3, n // 2):
            assert (rows.ids[:, f] < k).mean() == pytest.approx(below(k, n), abs=0.012)


def test_labels_have_the_probabilities_that_it_knows() -> None:
    source = GeneratedRows(GeneratorSection(rows=40_000), ROWS, 13)
    block = [source.block(i) for i in range(9)]
    labels = np.concatenate([b.rows.labels for b in block])
    logits = np.concatenate([b.logits for b in block])
    for low, high in [(-9, -2), (-2, -1), (-1, 0), (0, 9)]:
        chosen = (logits >= low) & (logits < high)
        expected = 1 / (1 + np.exp(-logits[chosen]))
        assert labels[chosen].mean() == pytest.approx(expected.mean(), abs=4 * (0.25 / chosen.sum()) ** 0.5)
    known = source.known_quality(1000, 30_000)
    assert known["best_possible_auc"] == pytest.approx(auc(labels[1000:30_000], logits[1000:30_000]), abs=1e-12)


def test_multi_hot() -> None:
    rows = GeneratedRows(GeneratorSection(rows=100), ROWS, 13, ids_per_row=(3, 1, 2, 1)).block(0).rows
    assert rows.ids.shape == (4096, 7)
    assert rows.ids.max(0)[6] < 5


def test_the_demo_leaves_room_above_dense_features_most_of_it_in_large_tables() -> None:
    job = read_job(DEMO)
    started = time.perf_counter()
    data = open_data(job, 0, 2)
    known = data.known_quality()
    assert known["best_possible_auc"] - known["dense_only_auc"] > 0.08
    data.splits.train.source.read(0, 200_000, BadRows("error"))
    assert time.perf_counter() - started < 30
    # Tables of more than 10,000 rows add most of the distance: little is left without them.
    large = np.array(job.rows_of_features()) > 10_000
    (source,) = data.splits.train.source.files
    assert isinstance(source, GeneratedRows)
    blocks = [source.block(i) for i in range(10)]
    labels = np.concatenate([b.rows.labels for b in blocks])
    logits = np.concatenate([b.logits for b in blocks])
    dense = np.concatenate([b.dense_part for b in blocks])
    only_large = np.concatenate([source.effects(b.rows.ids)[:, large].sum(1) for b in blocks])
    best, without, least = (auc(labels, x) for x in (logits, logits - only_large, dense))
    assert without - least < (best - least) / 3
