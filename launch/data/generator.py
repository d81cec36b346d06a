"""Rows in Criteo's form with a planted signal, whose true probabilities are computed."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from launch.auc import auc
from launch.data.rows import Array, Rows
from launch.data.shards import BLOCK
from launch.data.source import Block
from launch.sections import GeneratorSection

LARGE = 10_000  # rows above which a table holds most of the signal
_LARGE_SHARE = 0.85  # of the ids' variance
_DENSE_CENTRE = 1.5  # of log(1 + x)
_MISSING = 0.1


class GeneratedRows:
    """Rows, as a `BlockFile`, that depend on the seed and their own position alone, so that any rank makes its part.

    logit = bias + σ_d · u · t + Σ_f s_f · Σ_h z(f, id_fh) / √H_f, label ~ Bernoulli(sigmoid(logit)), where t is the
    dense features as the model sees them (log1p, 0 if missing), centred; u a random unit vector; z(f, id) ~ N(0, 1),
    drawn once for each id of a feature; and Σ_f s_f² the ids' variance, 85 % of it in tables above 10,000 rows.
    Ids follow a power law, id 0 being the most frequent. So frequent ids hold most of the signal that can be learned.

    Args:
        section (GeneratorSection): number of rows, seed, exponent and strengths.
        table_rows (Sequence[int]): S of each feature's table.
        dense_features (int): number of dense features.
        ids_per_row (Sequence[int] | None): ids per row of each feature; default: one.
    """

    name = "generator"

    def __init__(
        self,
        section: GeneratorSection,
        table_rows: Sequence[int],
        dense_features: int,
        ids_per_row: Sequence[int] | None = None,
    ) -> None:
        self._section, self.num_rows = section, section.rows
        self._dense_features = dense_features
        self._ids_per_row = tuple(ids_per_row or (1,) * len(table_rows))
        self._rows_of_column = np.repeat(np.array(table_rows, np.float64), self._ids_per_row)
        self._feature_of_column = np.repeat(np.arange(len(table_rows)), self._ids_per_row).astype(np.uint64)
        self._strengths = _strengths(np.array(table_rows), section.ids_strength)[self._feature_of_column.astype(int)]
        self._strengths /= np.sqrt(np.repeat(np.array(self._ids_per_row), self._ids_per_row))
        direction = np.random.default_rng([section.seed, 1]).standard_normal(dense_features)
        self._direction = direction / np.linalg.norm(direction)

    def blocks(self, start: int) -> Generator[Block, None, None]:
        for first in range(start // BLOCK * BLOCK, self.num_rows, BLOCK):
            rows = self.block(first // BLOCK).rows
            yield rows.cut(max(start - first, 0), min(self.num_rows - first, BLOCK)), {}

    def location(self, row: int) -> str:
        return f"generator:{row + 1}"

    def quoted(self, row: int, feature: int) -> str:
        first = sum(self._ids_per_row[:feature])
        rows = self.block(row // BLOCK).rows
        return str(rows.ids[row % BLOCK, first : first + self._ids_per_row[feature]].tolist())

    def known_quality(self, start: int, stop: int) -> dict[str, float]:
        """Returns the AUC on rows [start, stop) of the true logit, which only luck exceeds, and of its dense part."""
        blocks = [self.block(block) for block in range(start // BLOCK, -(-stop // BLOCK))]
        labels, logits, dense = (
            np.concatenate(arrays)[start % BLOCK :][: stop - start]
            for arrays in zip(*((b.rows.labels, b.logits, b.dense_part) for b in blocks), strict=True)
        )
        return {"best_possible_auc": auc(labels, logits), "dense_only_auc": auc(labels, dense)}

    def effects(self, ids: Array) -> Array:
        """Returns what each id (B, ΣH) adds to the true logit."""
        return _normal_by_hash(ids, self._feature_of_column, self._section.seed) * self._strengths

    def block(self, number: int) -> "Generated":
        """Returns rows [4096 · number, 4096 · (number + 1))."""
        random = np.random.default_rng([self._section.seed, 0, number])
        normal = random.standard_normal((BLOCK, self._dense_features), np.float32)
        dense = np.floor(np.expm1(normal + _DENSE_CENTRE))  # some are -1, as in Criteo's I2
        dense[random.random(dense.shape, np.float32) < _MISSING] = np.nan
        seen = np.log1p(np.maximum(np.nan_to_num(dense), 0))
        dense_part = self._section.dense_strength * ((seen - _DENSE_CENTRE) @ self._direction)

        ids = _power_law(random.random((BLOCK, len(self._rows_of_column))), self._rows_of_column, self._section.zipf)
        logits = self._section.bias + dense_part + self.effects(ids).sum(1)
        labels = random.random(BLOCK) * (1 + np.exp(-logits)) < 1
        rows = Rows(labels.astype(np.float32), dense.astype(np.float32), ids, self._ids_per_row)
        return Generated(rows, logits, dense_part)


@dataclass(frozen=True)
class Generated:
    """A block of rows, their true logits, and the dense part of those."""

    rows: Rows
    logits: Array
    dense_part: Array


def _strengths(table_rows: Array, total: float) -> Array:
    """Returns s_f: equal among large tables and among small ones."""
    large = table_rows > LARGE
    share = np.where(large, _LARGE_SHARE, 1 - _LARGE_SHARE)
    if large.all() or not large.any():
        share = np.ones(len(table_rows))
    count = np.where(large, large.sum(), (~large).sum())
    return total * np.sqrt(share / count)


def _power_law(uniform: Array, rows: Array, exponent: float) -> Array:
    """Returns ids in [0, rows) with P(id ≥ k) that of the continuous density x^-exponent on [1, rows + 1)."""
    if exponent == 1:
        x = (rows + 1) ** uniform
    else:
        power = 1 - exponent
        x = (1 + uniform * ((rows + 1) ** power - 1)) ** (1 / power)
    return np.minimum(x.astype(np.int64) - 1, rows.astype(np.int64) - 1)


def _normal_by_hash(ids: Array, features: Array, seed: int) -> Array:
    """Returns N(0, 1) for each id, the same wherever the id occurs: a hash, so that no table has to be kept."""
    key = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + (features + np.uint64(1)) * np.uint64(
        0xC2B2AE3D27D4EB4F
    )
    key = _mixed(key + np.uint64(seed) * np.uint64(0x165667B19E3779F9))
    low, high = (key & np.uint64(0xFFFFFFFF)).astype(np.float32), (key >> np.uint64(32)).astype(np.float32)
    return np.sqrt(-2 * np.log((low + 0.5) * 2.0**-32)) * np.cos(high * (2 * np.pi * 2.0**-32))


def _mixed(key: Array) -> Array:
    # This is the finalizer of SplitMix64.
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))
