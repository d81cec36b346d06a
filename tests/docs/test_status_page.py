"""docs/status.md says of each cell what is found by running it."""

import json
import re
from pathlib import Path

import pytest
import status_shardings
import torch
from cases import randomize
from interpreted_cells import KINDS as INTERPRETED
from single_tables import collection_of
from status_cells import BATCHES, COLUMNS, KINDS, OPERATIONS, PYTORCH, REFUSED, YES, mark_of, tables, tensors
from torch.export import Dim

from tests.inference.exported_models import Model
from tests.interpreted_process import run_interpreted
from torchrec_qr.inference import quantize_embeddings
from torchrec_qr.ops.backends import cpu

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "status.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
Marks = dict[tuple[str, ...], str]
RAN, CHECKED = "ran", "checked"


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def marks(title: str, keys: int) -> tuple[list[str], dict[tuple[str, ...], dict[str, str]]]:
    """Returns the columns of a section's table, and the marks of each row by its first ``keys`` cells and a column."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = {tuple(row[:keys]): dict(zip(head[keys:], row[keys:], strict=True)) for row in rows}
    assert len(found) == len(rows)
    return head[keys:], found


COLUMNS_OF_TABLES, TABLES = marks("Tables", 2)
COLUMNS_OF_SHARDINGS, SHARDINGS = marks("Sharding types", 1)


def test_the_page_has_every_cell_and_says_what_a_mark_means() -> None:
    assert list(TABLES) == [(kind, operation) for kind in KINDS for operation in OPERATIONS]
    assert set(COLUMNS_OF_TABLES) == {*COLUMNS, "GPU training", "AOTInductor"}
    assert list(SHARDINGS) == [(sharding,) for sharding in status_shardings.TYPES]
    assert [*status_shardings.COLUMNS, "on a GPU"] == COLUMNS_OF_SHARDINGS
    used = {mark for of in (TABLES, SHARDINGS) for row in of.values() for mark in row.values()}
    assert used == {YES, PYTORCH, REFUSED, RAN, CHECKED}
    assert {mark for mark in used if re.search(rf"^- \*{mark}\*: ", section("Marks"), re.MULTILINE)} == used


@pytest.mark.parametrize(
    "column", [pytest.param(c, marks=pytest.mark.slow) if c in ("torch.export", "TorchScript") else c for c in COLUMNS]
)
def test_a_column_says_what_its_cells_do(column: str) -> None:
    if not cpu.available():
        pytest.skip("the CPU kernels are not built")
    found = {key: mark_of(column, *key) for key in TABLES}
    assert found == {key: row[column] for key, row in TABLES.items()}


@pytest.mark.slow
def test_one_package_of_aotinductor_has_every_table_that_can_be_exported(tmp_path: Path) -> None:
    """The bits of the operator. One compilation for all, because each takes seconds."""
    cells = [key for key, row in TABLES.items() if row["AOTInductor"] == YES]
    assert cells == [key for key, row in TABLES.items() if row["torch.export"] == YES]
    assert {TABLES[key]["AOTInductor"] for key in set(TABLES) - set(cells)} == {REFUSED}
    configs = [t for i, (kind, of) in enumerate(cells) for t in tables(KINDS[kind], of, pooled=True, suffix=f"_{i}")]
    collection = collection_of(configs)
    randomize(collection, 0)
    given = [
        {name: bags["f_" + name.split("_")[1]] for config in configs for name in config.feature_names}
        for bags in BATCHES
    ]
    module = Model(quantize_embeddings(collection, torch.float32), tuple(given[0])).eval()
    with torch.no_grad():
        program = torch.export.export(
            module, tensors(given[0]), dynamic_shapes=({0: Dim.DYNAMIC}, {1: Dim.DYNAMIC}), strict=False
        )
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
        compiled = torch._inductor.aoti_load_package(package)
        for per_feature in given:
            (out,), (expected,) = compiled(*tensors(per_feature)), module(*tensors(per_feature))
            assert torch.equal(out, expected)


@pytest.mark.slow
def test_the_gpu_column_says_what_ran_and_what_the_interpreter_checks() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    lines = run_interpreted(Path(__file__).with_name("interpreted_cells.py"), timeout=280)
    right = {(kind, operation) for kind, operation in json.loads(lines[-1])}
    assert {kind for kind, _ in right} == set(INTERPRETED)
    for key, row in TABLES.items():
        expected = RAN if key in ran_on_a_gpu() else CHECKED if key in right else PYTORCH
        assert row["GPU training"] == expected, key
        assert (row["CPU training"] == YES) == (key in right), "the kernels of both devices take the same tables"


def ran_on_a_gpu() -> set[tuple[str, str]]:
    """Returns the tables of the recorded runs: quotients and remainders alone, by `num_collisions`, as products."""
    for name in ("dynamicemb", "dlrm"):
        recorded = json.loads((RESULTS / f"2026-11-28_gpu_{name}.json").read_text())
        assert recorded["device"].startswith("NVIDIA H100")
        fused = [row for row in recorded["rows"] if row["variant"].startswith("fused")]
        assert fused
        assert all(row["m"] and row["largest_error_of_allowed"] < 1 for row in fused)
    assert "2026-11-28" in section("Marks")
    return {("quotient_remainder, strided", "mult")}


@pytest.mark.slow
def test_sharded_tables_train_or_are_refused_as_the_page_says() -> None:
    cells = {(key[0], column): row[column] for key, row in SHARDINGS.items() for column in status_shardings.COLUMNS}
    assert set(cells.values()) == {YES, REFUSED}
    status_shardings.assert_refused([cell for cell, mark in cells.items() if mark == REFUSED])
    status_shardings.assert_trained([cell for cell, mark in cells.items() if mark == YES])


def test_every_sharding_type_but_copies_per_node_ran_on_a_gpu() -> None:
    record = " ".join((RESULTS / "gpu.md").read_text().replace(",", "").split())
    assert "all shardings of one rank of NCCL and of two ranks of gloo that share the GPU" in record
    per_node = {key: row["on a GPU"] for key, row in SHARDINGS.items() if key[0].endswith("_per_node")}
    assert set(per_node.values()) == {CHECKED}
    assert {row["on a GPU"] for key, row in SHARDINGS.items() if key not in per_node} == {RAN}
