"""The benchmark of served tables on small ones: what it compares is right, and its figures fit together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import serving
from torchrec_qr.ops.serving_library import load_operators

pytestmark = pytest.mark.skipif(not load_operators(), reason="the operators' library was not built")
NAMES = {"full", "fbgemm", "qr_sqrt", "qr_4", "hashed_sqrt", "hashed_4"}
CELL = serving.Cell(tables=3, rows=10_000, batch=4, hot=2, threads=1, ids="uniform")


def test_quick_figures_of_all_cells(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    serving.main(["--quick", "--threads", "1", "--hot", "1", "3", "--json", str(tmp_path / "out.json")])
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["row_type"] == "int8"
    assert {"date", "commit", "processor", "load", "versions"} <= set(report)
    assert [(r["batch"], r["hot"]) for r in report["rows"]] == [(1, 1), (1, 3), (16, 1), (16, 3)]
    for row in report["rows"]:
        check_row(row)


def check_row(row: dict[str, Any]) -> None:
    measured = {name: of for name, of in row.items() if isinstance(of, dict)}
    assert set(measured) == NAMES
    assert (row["tables"], row["rows"], row["threads"], row["ids"]) == (3, 10_000, 1, "uniform")
    # 80 bytes a row: scale and bias, 64 values, and padding.
    assert measured["full"]["bytes"] == 3 * 10_000 * 80
    assert measured["hashed_4"]["bytes"] == 3 * 2504 * 80
    for of in measured.values():
        assert 0 < of["p50_us"] <= of["p99_us"]
        for base in ("full", "fbgemm"):
            assert of[f"to_{base}"] == pytest.approx(of["p50_us"] / measured[base]["p50_us"], rel=0.01)
            assert 0 < of[f"to_{base}_spread"][0] <= of[f"to_{base}_spread"][1]
    for name in ("qr_sqrt", "qr_4"):
        assert measured[name]["lookups"] == 1
        assert measured[name]["bytes_to_full"] == pytest.approx(
            measured[name]["bytes"] / measured["full"]["bytes"], abs=1e-6
        )
    # 68 bytes a row, and what says which table it is.
    assert 0 < measured["qr_4"]["bytes"] - 3 * 2504 * 68 < 2000


@pytest.mark.parametrize("name", ["full", "qr_sqrt"])
def test_wrong_values_are_not_timed(name: str) -> None:
    served = serving.served_tables(CELL.tables, CELL.rows)
    assert serving.check(CELL, name, served[name]) == 1
    wrong = served[name]._replace(rows_of=lambda t, ids: served[name].rows_of(t, ids) * (1.01 if t == 1 else 1.0))
    with pytest.raises(RuntimeError, match=f"{name}, Cell.*: the values differ"):
        serving.check(CELL, name, wrong)


def test_log_uniform_ids_prefer_small_ones() -> None:
    ids = serving.Batches(CELL._replace(batch=4000, ids="log_uniform"), CELL.rows).next_ids()
    assert 0 <= int(ids.min()) <= int(ids.max()) < CELL.rows
    assert float((ids < 100).float().mean()) == pytest.approx(0.5, abs=0.03)
