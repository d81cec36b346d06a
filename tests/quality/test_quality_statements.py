"""Verdicts on statements, on numbers made up to have one."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.quality.cells import DATA, RATES, Cell, at_rates, cells
from benchmarks.quality.plots import draw
from benchmarks.quality.statements import Statement, judged, listed, statements
from benchmarks.quality.summary import Summary, impossible, search_table, summaries, table

MULT, HASH = Cell("criteo", "mult", 4), Cell("criteo", "hash", 4)


def result(cell: Cell, seed: int, logloss: float) -> dict[str, object]:
    sizes = {"rows": 100, "mib": 1.0, "compression": cell.compression or 1, "cpu_ms_per_step": 7.0}
    return {"cell": asdict(cell), "seed": seed, "logloss": logloss, "auc": 0.7, "ne": 0.8, **sizes}


def found(left: list[float], right: list[float]) -> dict[Cell, Summary]:
    runs = [result(MULT, seed, x) for seed, x in enumerate(left)]
    return summaries([*runs, *(result(HASH, seed, x) for seed, x in enumerate(right))])


def outcome(left: list[float], right: list[float], **fields: object) -> str:
    return judged(Statement("a", "", MULT, HASH, **fields), found(left, right)).outcome  # type: ignore[arg-type]


def test_a_clear_difference_decides_and_an_unclear_one_does_not() -> None:
    assert outcome([0.50, 0.51, 0.52], [0.51, 0.52, 0.531]) == "holds"
    assert outcome([0.51, 0.52, 0.531], [0.50, 0.51, 0.52]) == "does not hold"
    assert outcome([0.50, 0.52, 0.51], [0.51, 0.51, 0.51]) == "undecided"


def test_the_interval_is_student_s_of_paired_differences() -> None:
    verdict = judged(Statement("a", "", MULT, HASH), found([0.50, 0.51, 0.52], [0.51, 0.53, 0.53]))
    assert verdict.mean == pytest.approx(-0.04 / 3)
    assert verdict.deviation == pytest.approx(0.01 / 3**0.5)
    assert verdict.bound == pytest.approx(2.920 * 0.01 / 3)


def test_a_factor_leaves_room() -> None:
    left, right = [0.501, 0.511, 0.521], [0.5, 0.51, 0.52]
    assert outcome(left, right) == "does not hold"
    assert outcome(left, right, factor=1.003) == "holds"
    assert outcome(left, right, factor=1.001) == "does not hold"


def test_a_tie_is_shown_by_an_interval_within_the_margin() -> None:
    assert outcome([0.5001, 0.51, 0.52], [0.5, 0.5101, 0.52], tie=True) == "holds"
    assert outcome([0.501, 0.511, 0.521], [0.5, 0.51, 0.52], tie=True) == "does not hold"
    assert outcome([0.50, 0.52, 0.51], [0.51, 0.51, 0.51], tie=True) == "undecided"


def test_without_two_common_seeds_nothing_is_said() -> None:
    assert outcome([0.5], [0.5, 0.6]) == "not run"
    verdict = judged(Statement("a", "x", MULT, Cell("criteo", "full")), found([0.5, 0.6], [0.5, 0.6]))
    assert verdict.outcome == "not run"
    assert "| a | x | **not run** |" in listed([verdict])


def test_summaries_and_their_table() -> None:
    refused = {"cell": result(Cell("criteo", "mult", 250), 0, 0)["cell"], "impossible": "ends at 70"}
    runs = [refused, result(MULT, 1, 0.52), result(MULT, 0, 0.50)]
    summary = summaries(runs)[MULT]
    assert list(summary.runs) == [0, 1]
    assert summary.mean("logloss") == pytest.approx(0.51)
    assert summary.deviation("logloss") == pytest.approx(0.02 / 2**0.5)
    assert impossible(runs) == {Cell("criteo", "mult", 250): "ends at 70"}
    row = table(summaries(runs), [HASH, MULT]).splitlines()[2]
    assert row == "| mult | 4× |  | 2 | 0.5100 ± 0.0141 | 0.7000 ± 0.0000 | 0.8000 ± 0.0000 | 100 | 1.00 | 7 |"


def test_every_statement_is_of_cells_that_are_planned_or_impossible() -> None:
    for data in DATA:
        planned = set(cells(data))
        for statement in statements(data):
            of = at_rates if statement.search else lambda cell: [cell]
            assert {*of(statement.left), *of(statement.right)} <= planned, statement


def test_a_search_takes_the_rate_that_validates_best_whatever_it_tests_as() -> None:
    def runs(cell: Cell, validation: list[float], test: list[float]) -> list[dict[str, object]]:
        cells = [replace(cell, lr_factor=factor) for factor in RATES]
        return [
            {**result(at, seed, loss + seed / 1000), "validation_logloss": validated}
            for at, validated, loss in zip(cells, validation, test, strict=True)
            for seed in range(3)
        ]

    mult = runs(MULT, [0.6, 0.5, 0.4, 0.5, 0.6], [0.3, 0.3, 0.52, 0.3, 0.3])
    hashed = runs(HASH, [0.4, 0.5, 0.6, 0.6, 0.6], [0.51, 0.9, 0.9, 0.9, 0.9])
    statement = Statement("a", "", MULT, HASH, search=True)
    verdict = judged(statement, summaries([*mult, *hashed]))
    assert (verdict.outcome, verdict.mean) == ("does not hold", pytest.approx(0.01))
    lines = search_table(summaries([*mult, *hashed]), [MULT, HASH])
    assert lines is not None
    assert lines.splitlines()[2:] == [
        "| mult | 4× | lr factor 4.0 | 3 | 0.5210 ± 0.0010 | 0.7000 ± 0.0000 |",
        "| hash | 4× |  | 3 | 0.5110 ± 0.0010 | 0.7000 ± 0.0000 |",
    ]
    without_one_rate = [run for run in mult if run["cell"]["lr_factor"] != RATES[0]]  # type: ignore[index]
    assert judged(statement, summaries([*without_one_rate, *hashed])).outcome == "not run"


def test_plots_of_the_few_runs_that_there_are(tmp_path: Path) -> None:
    runs = [result(Cell("criteo", "full"), 0, 0.49)]
    runs += [result(Cell("criteo", m, c), 0, 0.5 + c / 1e3) for m in ("hash", "mult") for c in (4, 60)]  # type: ignore[arg-type]
    written = draw(summaries(runs), tmp_path)
    assert [p.name for p in written] == ["quality_size.svg", "quality_collisions.svg", "quality_operation.svg"]
    assert all(p.stat().st_size > 1000 for p in written)
    assert draw({}, tmp_path) == []
