"""Ids to rows of tables; dense features; the vocabulary's order."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from click_rows import click_rows

from launch.data.dense import transformed
from launch.data.errors import BadRows, DataError
from launch.data.id_mapping import IdMapping, ValueCounts, Vocabulary, load_vocabularies, save_vocabularies
from launch.data.rows import MISSING, Rows, ragged


def rows_of(ids: list[list[int]], ids_per_row: tuple[int, ...]) -> Rows:
    n = len(ids)
    return Rows(np.zeros(n, np.float32), np.zeros((n, 1), np.float32), np.array(ids), ids_per_row)


def where(row: int) -> str:
    return f"file:{row + 1}"


def quoted(row: int, feature: int) -> str:
    return f"'v{row},{feature}'"


@pytest.mark.parametrize("as_ragged", [False, True])
def test_modulo_vocabulary_and_encoded(as_ragged: bool) -> None:
    rows = rows_of([[7, 103, 5], [MISSING, 3, 2**31 + 1]], ids_per_row=(1, 2))
    if as_ragged:
        rows = ragged(rows)

    def ids(mapping: IdMapping) -> list[list[int]]:
        return mapping(rows, BadRows("error"), where, quoted).ids.reshape(2, 3).tolist()  # type: ignore[no-any-return]

    assert ids(IdMapping("modulo", ["a", "b"], [5, 100])) == [[2, 3, 5], [0, 3, (2**31 + 1) % 100]]
    vocabularies = {"a": Vocabulary(np.array([MISSING, 9, 7])), "b": Vocabulary(np.array([3, 5, 103]))}
    assert ids(IdMapping("vocabulary", ["a", "b"], [4, 3], vocabularies)) == [[3, 0, 2], [1, 1, 0]]
    assert ids(IdMapping("vocabulary", ["a", "b"], [8, 104])) == [[7, 103, 5], [0, 3, 0]]
    with pytest.raises(DataError, match=r"file:2: b is 'v1,1'; allowed: 0..103, the rows of its table"):
        ids(IdMapping("encoded", ["a", "b"], [8, 104]))
    bad = BadRows("skip")
    mapped = IdMapping("encoded", ["a", "b"], [8, 104])(rows, bad, where, quoted)
    assert (bad.count, mapped.weights.tolist()) == (1, [1, 0])  # type: ignore[union-attr]
    assert mapped.ids.reshape(2, 3).tolist() == [[7, 103, 5], [0, 0, 0]]
    assert ids(IdMapping("encoded", ["a", "b"], [8, 2**32])) == [[7, 103, 5], [0, 3, 2**31 + 1]]


@pytest.mark.parametrize("as_ragged", [False, True])
def test_raw_features_keep_all_64_bits_and_the_others_are_mapped(as_ragged: bool) -> None:
    least, most = MISSING + 1, 2**63 - 1
    rows = rows_of([[7, least, most], [3, MISSING, 2**31], [9, -1, 4]], ids_per_row=(1, 2))
    if as_ragged:
        rows = ragged(rows)

    def ids(kind: Literal["modulo", "vocabulary", "encoded"], size: int, known: dict[str, Vocabulary] | None) -> Any:
        mapped = IdMapping(kind, ["a", "b"], [size, 100], known, raw={"b"})(rows, BadRows("error"), where, quoted)
        assert mapped.weights is None
        return mapped.ids.reshape(3, 3).tolist()

    raw = [[least, most], [MISSING, 2**31], [-1, 4]]
    assert ids("modulo", 5, None) == [[a, *b] for a, b in zip([2, 3, 4], raw, strict=True)]
    known = {"a": Vocabulary(np.array([9, 7]))}
    assert ids("vocabulary", 5, known) == [[a, *b] for a, b in zip([2, 0, 1], raw, strict=True)]
    assert ids("vocabulary", 8, None) == [[a, *b] for a, b in zip([7, 3, 0], raw, strict=True)]
    assert ids("encoded", 10, None) == [[a, *b] for a, b in zip([7, 3, 9], raw, strict=True)]
    with pytest.raises(DataError, match=r"file:3: a is 'v2,0'; allowed: 0..8, the rows of its table"):
        ids("encoded", 9, None)


def test_some_features_alone_are_counted() -> None:
    counts = ValueCounts([2, 0])
    counts.add(rows_of([[1, 2, 3], [1, 5, 4]], ids_per_row=(1, 1, 1)))
    assert [v.values.tolist() for v in counts.vocabularies()] == [[3, 4], [1]]


def test_vocabulary_is_in_the_order_of_frequency() -> None:
    counts = ValueCounts([0])
    for part in ([5, 5, 9, 2], [2, 9, 9, MISSING], [4]):
        counts.add(rows_of([[x] for x in part], ids_per_row=(1,)))
    assert counts.cardinalities() == [5]
    assert counts.vocabularies()[0].values.tolist() == [9, 2, 5, MISSING, 4]
    assert counts.vocabularies(min_count=2)[0].values.tolist() == [9, 2, 5]


def test_features_of_one_table_share_a_vocabulary() -> None:
    counts = ValueCounts([0, 1, 2])
    for seen, viewed, shop in [(5, 9, 5), (5, 7, 5), (7, 9, 8), (3, 9, 5)]:
        counts.add(rows_of([[seen, viewed, shop]], ids_per_row=(1, 1, 1)))
    of_features = counts.vocabularies(min_count=2, tables=["item", "item", "shop"])
    assert [v.values.tolist() for v in of_features] == [[9, 5, 7], [9, 5, 7], [5]]
    assert of_features[0].counts is not None
    assert of_features[0].counts.tolist() == [3, 2, 2]


def test_rows_of_weight_0_are_not_counted() -> None:
    counts = ValueCounts([0])
    counts.add(dataclasses.replace(rows_of([[1], [2], [1]], (1,)), weights=np.float32([1, 0, 1])))
    assert counts.vocabularies()[0].values.tolist() == [1]


def test_counts_as_numpy_counts_them_all_at_once() -> None:
    rows = click_rows(np.random.default_rng(0), 3000)
    rows = dataclasses.replace(rows, ids=rows.ids % 50)
    counts = ValueCounts(range(26))
    for start in range(0, 3000, 700):
        counts.add(rows.cut(start, min(start + 700, 3000)))
        counts.cardinalities()
    for f, vocabulary in enumerate(counts.vocabularies()):
        values, n = np.unique(rows.ids[:, f], return_counts=True)
        assert vocabulary.values.tolist() == values[np.argsort(-n, kind="stable")].tolist()


def test_vocabularies_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "v.npz"
    save_vocabularies(file, {"a": Vocabulary(np.array([5, 3])), "b": Vocabulary(np.array([], np.int64))})
    a, b = load_vocabularies(file, ["a", "b"]).values()
    assert (a.values.tolist(), b.values.tolist()) == ([5, 3], [])
    assert b.ids(np.array([5, 7])).tolist() == [0, 0]
    with pytest.raises(DataError, match=r"v.npz: no vocabulary of 'c'; it has a, b"):
        load_vocabularies(file, ["a", "c"])
    with pytest.raises(DataError, match=r"none.npz: no such file"):
        load_vocabularies(tmp_path / "none.npz", ["a"])
    file.write_bytes(b"PK\3\4junk")
    with pytest.raises(DataError, match=r"v.npz: not a vocabulary"):
        load_vocabularies(file, ["a"])


def test_dense() -> None:
    x = np.float32([[np.nan, -2, 0, np.e - 1]])
    np.testing.assert_allclose(transformed(x, "log1p", False), [[0, 0, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(transformed(x, "none", True), [[0, -2, 0, np.e - 1, 1, 0, 0, 0]], rtol=1e-6)
