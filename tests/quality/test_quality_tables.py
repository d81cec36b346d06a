"""Cells of the quality study have the totals that they claim."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest

from benchmarks.quality.cells import COMPRESSIONS, DATA, Cell, Method, cells, in_order
from benchmarks.quality.method_tables import DIM, TOLERANCE, ImpossibleCellError, parameters_of, tables_of
from torchrec_qr.cli.schema import TableSpec, load

# Roughly Criteo's: a few large tables, some of thousands of rows, and many small ones.
ROWS = dict(zip("abcdefghij", (53_718, 49_113, 28_554, 12_994, 8302, 3981, 1297, 523, 145, 4), strict=True))
LOGICAL = sum(ROWS.values()) * DIM
# The largest compression that these tables can have under a method; under the others it is 60.
LARGEST = {"hash": 250, "mixed_radix_3": 250, "chinese_remainder_3": 250, "path_16": 4, "path_64": 4}
METHODS = [m for m in get_args(Method) if m not in ("full", "natural")]


def built(table: dict[str, object]) -> object:
    return load(TableSpec, table).build()


@pytest.mark.parametrize(("method", "compression"), list(itertools.product(METHODS, COMPRESSIONS)))
def test_every_method_has_the_total_asked_for_or_says_why_not(method: Method, compression: int) -> None:
    cell = Cell("criteo", method, compression, threshold=200 if compression < 250 else 20)
    if compression > LARGEST.get(method, 60):
        with pytest.raises(ImpossibleCellError, match="ends at"):
            tables_of(cell, ROWS)
        return
    tables = tables_of(cell, ROWS)
    total = sum(map(parameters_of, tables))
    assert LOGICAL / compression * (1 - TOLERANCE) <= total <= LOGICAL / compression
    assert [t["name"] for t in tables] == list(ROWS)
    for table in tables:
        whole = ROWS[table["name"]] * DIM
        assert parameters_of(table) <= whole
        assert ("partitions" in table) == (parameters_of(table) < whole)
        assert "partitions" not in table or ROWS[table["name"]] > cell.threshold


def test_parameters_are_those_of_the_built_config_mlps_counted() -> None:
    keys = {"name": "t", "num_embeddings": 1000, "embedding_dim": DIM, "operation": "path", "path_hidden": 16}
    table = {**keys, "partitions": {"kind": "quotient_remainder", "num_collisions": 4}}
    mlp = 16 * DIM + 16 + DIM * 16 + DIM
    assert parameters_of(table) == 250 * DIM + 4 * mlp


def test_shares_are_even_over_tables() -> None:
    tables = {t["name"]: t for t in tables_of(Cell("criteo", "mult", 16), ROWS)}
    collisions = [tables[name]["partitions"]["num_collisions"] for name in "abcde"]
    assert max(collisions) <= min(collisions) + 3


def test_natural_partitions_are_the_data_s_own() -> None:
    with pytest.raises(ImpossibleCellError, match="no classes of its own"):
        tables_of(Cell("criteo", "natural"), ROWS)
    tables = tables_of(Cell("movielens", "natural"), ROWS, {"a": "classes.npy"})
    assert tables[0]["partitions"] == {"kind": "explicit", "file": "classes.npy"}
    assert all("partitions" not in table for table in tables[1:])


def test_no_cell_is_there_twice_and_each_has_a_file_of_its_own() -> None:
    planned = in_order(DATA)
    assert len(planned) == len(set(planned)) == len({cell.key for cell in planned})
    assert set(planned) == {cell for name in DATA for cell in cells(name)}


def test_a_cell_s_key_names_what_differs() -> None:
    cell = Cell("criteo", "mult", 4)
    assert replace(cell, threshold=20, optimizer="amsgrad").key == "criteo.mult.4x.optimizer=amsgrad.threshold=20"
    assert Cell("criteo", "full").key == "criteo.full"
