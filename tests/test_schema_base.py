"""A config that builds on another by ``base``: merged deeply, entries of lists by path, every file named in errors."""

from pathlib import Path

import pytest
from schema_cases import error_of

from torchrec_qr.cli.schema import read_planner, read_tables, read_yaml

BASE = """
train: {name: base, seed: 1, rates: [1, 2]}
tables:
  - &a {name: a, num_embeddings: 100, embedding_dim: 16, partitions: {kind: hash, rows: 10}}
  - {<<: *a, name: b, num_embeddings: 1000}
  - {name: c, num_embeddings: 5, embedding_dim: 16}
planner: {topology: 1x2}
"""


def files(folder: Path, **texts: str) -> Path:
    """Writes files; returns the last one."""
    for name, text in texts.items():
        file = folder / f"{name}.yaml"
        file.write_text(text)
    return file


def test_mappings_merge_and_all_else_is_replaced(tmp_path: Path) -> None:
    over = "base: below.yaml\ntrain: {name: over, rates: [3], more: {x: 1}}\nplanner: {topology: 2x2, device: cpu}\n"
    read = read_yaml(files(tmp_path, below=BASE, over=over))
    assert read["train"] == {"name": "over", "seed": 1, "rates": [3], "more": {"x": 1}}
    assert read["planner"] == {"topology": "2x2", "device": "cpu"}
    assert read["tables"] == read_yaml(tmp_path / "below.yaml")["tables"]
    assert list(read) == ["train", "tables", "planner"]


def test_entries_of_a_list_change_by_path_each_in_its_own_place(tmp_path: Path) -> None:
    over = """
base: below.yaml
tables[*]: {pooling: mean}
tables[num_embeddings>99].partitions.rows: 9
tables[b]: {partitions: {rows: 8}, pooling: sum}
tables[2].name: d
train.seed: 2
"""
    read = read_yaml(files(tmp_path, below=BASE, over=over))
    a, b, d = read["tables"]
    assert a["partitions"] == {"kind": "hash", "rows": 9}
    assert b["partitions"] == {"kind": "hash", "rows": 8}
    assert (a["pooling"], b["pooling"], d["pooling"], d["name"]) == ("mean", "sum", "mean", "d")
    assert "partitions" not in d
    assert read["train"]["seed"] == 2


def test_a_base_may_have_a_base_each_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    files(tmp_path, below=BASE)
    files(tmp_path / "inner", middle="base: ../below.yaml\ntrain: {seed: 2, name: middle}")
    top = files(tmp_path, top="base: inner/middle.yaml\ntrain: {name: top}\nplanner: {device: cpu}")
    assert read_yaml(top)["train"] == {"name": "top", "seed": 2, "rates": [1, 2]}
    assert [table.name for table in read_tables(top)] == ["a", "b", "c"]
    assert (read_planner(top).topology, read_planner(top).device) == ("1x2", "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: none.yaml", "{over}: base: 'none.yaml' cannot be read: No such file or directory"),
        ("base: .", "{over}: base: '.' cannot be read: Is a directory"),
        ("base: over.yaml", "{over}: base: 'over.yaml' builds on this file"),
        ("base: [below.yaml]", "{over}: base: ['below.yaml']; allowed: the name of a file, relative to this one"),
        ("base:", "{over}: base: None; allowed: the name of a file, relative to this one"),
        ("base: twice.yaml", "{over}: base: {twice}: line 2, column 1: duplicate key 'a', first on line 1"),
        ("base: lost.yaml", "{over}: base: {lost}: base: 'none.yaml' cannot be read: No such file or directory"),
        ("base: round.yaml", "{over}: base: {round}: base: 'over.yaml' builds on this file"),
        (
            "base: below.yaml\ntables[d].pooling: sum",
            "{over}: tables[d].pooling: tables has no entry of the name 'd'",
        ),
        (
            "base: below.yaml\ntables[rows>9].pooling: sum",
            "{over}: tables[rows>9].pooling: tables has no entry whose rows is more than 9",
        ),
        ("base: below.yaml\ntables[3].pooling: sum", "{over}: tables[3].pooling: tables has 3 entries"),
        ("base: below.yaml\ntrain[0].seed: 1", "{over}: train[0].seed: train is not a list"),
        ("base: below.yaml\ntables[].seed: 1", "{over}: 'tables[].seed'; allowed: a path of keys, such as"),
        ("base: below.yaml\n3: 1", "{over}: 3; allowed: a path of keys, such as"),
    ],
)
def test_errors_name_every_file_on_the_way_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    others = {"below": BASE, "twice": "a: 1\na: 2", "lost": "base: none.yaml", "round": "base: over.yaml"}
    over = files(tmp_path, **others, over=text)
    names = {name: tmp_path / f"{name}.yaml" for name in (*others, "over")}
    assert error_of(read_yaml, over).startswith(message.format(**names))


def test_a_wrong_value_is_told_by_the_file_that_was_read(tmp_path: Path) -> None:
    over = files(tmp_path, below=BASE, over="base: below.yaml\ntables[b].partitions: {rows: 0}")
    assert error_of(read_tables, over).startswith(f"{over}: tables[1].partitions")
