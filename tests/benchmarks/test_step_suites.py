"""The step benchmark on ranks that others start, and a step that goes wrong."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torchx_job import COMPONENTS, output_of, torchx

from benchmarks import step, step_suites
from benchmarks.step_cells import Tables, Traffic
from benchmarks.step_check import check
from benchmarks.step_variants import VARIANTS
from launch.process_group import start_process_group
from tests.launch.jobs import start_ranks

pytestmark = pytest.mark.timeout(300)
SHORT = ("--runs", "2", "--steps", "2", "--bags", "8")
PHASES = ("forward", "backward", "step", "eval")


def measured(path: Path, *argv: str, world_size: int, before: Callable[[], None] | None = None) -> list[int | None]:
    """Runs the benchmark on ranks, each of which calls ``before`` first; returns their exit codes."""
    ranks = start_ranks(partial(measure, [*argv, "--json", str(path)], before), path.parent, world_size)
    codes = ranks.exit_codes()
    assert set(codes) <= {0, 1}, ranks.text()
    assert path.exists(), ranks.text()
    return codes


def measure(argv: list[str], before: Callable[[], None] | None) -> int:
    if before is not None:
        before()
    return step.main(argv)


def report(path: Path, world_size: int, suite: str) -> dict[str, Any]:
    """Returns the first row of each variant. Checks all rows, and the fields of the report that describe the job."""
    found = json.loads(path.read_text())
    assert (found["suite"], found["world_size"]) == (suite, world_size)
    assert (found["backend"], found["device"]) == ("gloo", "cpu")
    assert found["copy_gb_s"] > 0
    assert {"torch", "torchrec"} <= set(found["versions"])
    assert {"commit", "date", "threads_of_rank"} <= set(found)
    for row in found["rows"]:
        if "wrong" not in row:
            check_row(row, found["copy_gb_s"], world_size)
    return {row["variant"]: row for row in reversed(found["rows"])}


def check_row(row: dict[str, Any], copy_gb_s: float, world_size: int) -> None:
    assert 0 <= row["largest_error_of_allowed"] <= 1
    assert len(row["peak_memory_mb_of_ranks"]) == len(row["step_growth_mb_of_ranks"]) == world_size
    for phase in PHASES:
        of = row[phase]
        assert 0 < of["p20_ms"] <= of["p50_ms"] <= of["p80_ms"]
        assert of["gb_s"] == pytest.approx(of["required_bytes"] / of["p50_ms"] / 1e6, rel=0.01, abs=0.002)
        assert of["to_copy"] == pytest.approx(of["gb_s"] / copy_gb_s, rel=0.01, abs=0.002)
        least, largest = of["to_full_spread"]
        assert 0 < least <= of["to_full"] <= largest
    both = row["forward"]["required_bytes"] + row["backward"]["required_bytes"]
    assert row["step"]["required_bytes"] == pytest.approx(both, abs=1)


@pytest.mark.slow
def test_torchx_runs_mlperfs_tables_on_its_ranks(tmp_path: Path) -> None:
    file = tmp_path / "dlrm.json"
    options = (*SHORT, "--max-rows", "12000", "--json", str(file))
    component = (f"{COMPONENTS}:bench", "-j", "1x2", "--suite", "dlrm", "--env", "CUDA_VISIBLE_DEVICES=-1")
    code, output = torchx("run", "-s", "local_cwd", *component, "--", *options)
    assert code == 0, output
    rows = report(file, 2, "dlrm")
    assert set(rows) == {"full", "full_our_planner", "fused", "fused_our_planner"}
    sizes = [min(n, 12_000) for n in step_suites.MLPERF_ROWS]
    compressed = [n for n in sizes if n > 10_000]
    for name, row in rows.items():
        assert (row["num_ids"], row["hot"], row["dim"]) == (sizes, list(step_suites.MLPERF_IDS_PER_BAG), 128)
        assert sum(row["plan"].values()) == 26
        saved = 0 if name.startswith("full") else sum(n - (-(-n // 4) + 4) for n in compressed)
        assert row["stored_rows"] == sum(sizes) - saved


@pytest.mark.parametrize(
    ("suite", "options", "variants"),
    [
        pytest.param(
            "headline",
            ("--num-ids", "60", "--dims", "16", "--steps", "1"),
            {"full", "stock_pooled", "stock_unpooled", "dlrm_bag", "fused_alone", "fused", "fallback"},
            marks=pytest.mark.slow,
        ),
        ("dynamicemb", ("--scale", "0.0001"), {"full", "fused"}),
        pytest.param("nodes", (), {"full", "fused", "copy_per_node", "copy_per_rank"}, marks=pytest.mark.slow),
    ],
)
def test_suites_on_two_ranks(tmp_path: Path, suite: str, options: tuple[str, ...], variants: set[str]) -> None:
    file = tmp_path / "rows.json"
    assert measured(file, "--suite", suite, *SHORT, *options, world_size=2) == [0, 0]
    assert set(report(file, 2, suite)) == variants


@pytest.mark.slow
def test_without_torchrun_two_ranks_start_on_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ("--suite", "grid", "--shardings", "column_wise", "--num-ids", "60", "--dims", "16")
    code, output = output_of("benchmarks.step", *options, *SHORT, "--json", str(file), CUDA_VISIBLE_DEVICES="-1")
    assert code == 0, output
    assert set(report(file, 2, "grid")) == {"full", "fused"}


def test_lookups_alone_and_the_bytes_that_they_need(tmp_path: Path) -> None:
    file = tmp_path / "tbe.json"
    options = ("--num-ids", "4", "--dims", "16", "--bags", "64", "--runs", "1", "--steps", "2")
    assert measured(file, "--suite", "tbe", *options, world_size=1) == [0]
    rows = report(file, 1, "tbe")
    # 26 tables of 4 ids, all of which 64 bags look up; 4 ids that share a row make partitions of 1 and 4 rows.
    batch = 8 * 26 * 64 + 8 * (26 * 64 + 1) + 4 * 16 * 26 * 64
    for name, looked_up in (("tbe", 4), ("fused_alone", 5)):
        stored = 4 * 16 * 26 * looked_up
        assert (rows[name]["m"], rows[name]["hot"], rows[name]["full_is"]) == (4, 1, "tbe")
        assert rows[name]["forward"]["required_bytes"] == rows[name]["eval"]["required_bytes"] == stored + batch
        assert rows[name]["backward"]["required_bytes"] == 2 * stored + batch


def make_wrong(kind: str, name: str, rank: int, calls: int) -> None:
    """Makes a variant go wrong on one rank.

    ``output``: after so many lookups all outputs are 0.1 % off. ``rows``: after so many steps a table is 0.001 off.
    """
    variant: Any = VARIANTS[name]
    method = "out" if kind == "output" else "backward"
    right = getattr(variant, method)

    def wrong(self: Any, *args: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        result = right(self, *args)
        if self.calls <= calls or rank != int(os.environ["RANK"]):
            return result
        if kind == "output":
            return result * 1.001
        next(iter(self.state().values())).add_(0.001)
        return result

    setattr(variant, method, wrong)


# The first lookup and the first step are those that are checked before timing.
@pytest.mark.parametrize(("kind", "when", "calls"), [("output", "after", 1), ("rows", "before", 0)])
def test_a_wrong_step_gets_no_time(tmp_path: Path, kind: str, when: str, calls: int) -> None:
    file = tmp_path / "rows.json"
    options = ("--suite", "tbe", "--num-ids", "60", "--dims", "16", *SHORT)
    before = partial(make_wrong, kind, "fused_alone", 0, calls)
    assert measured(file, *options, world_size=1, before=before) == [1]
    rows = report(file, 1, "tbe")
    of = {"output": "output of f", "rows": "rows of f0.partition_0 after a step, at "}[kind]
    assert rows["fused_alone"]["wrong"].startswith(f"{when} the timed steps: {of}")
    assert not set(PHASES) & set(rows["fused_alone"])
    assert rows["tbe"]["step"]["to_full"] == 1


def test_values_that_are_wrong_on_another_rank_only(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ("--suite", "dynamicemb", "--scale", "0.0001", *SHORT)
    assert measured(file, *options, world_size=2, before=partial(make_wrong, "output", "full", 1, 0)) == [1, 1]
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["full"]["wrong"].startswith("before the timed steps: output of f")
    assert "step" not in rows["full"]
    assert rows["fused"]["step"]["to_full"] is None


def check_row_wise_tables() -> None:
    """Checks a right step of row-wise tables, then one after which rows of the last rank alone are 0.001 off."""
    device = start_process_group()
    traffic = Traffic(8, (2, 3), 1.05)
    variant: Any = VARIANTS["fused"](Tables((60, 90), 16, "sgd", "row_wise"), 4, traffic, device)
    assert variant.plan == {"row_wise": 2}
    right = check(variant, traffic, 0)
    assert right.wrong is None, right
    backward = variant.backward

    def wrong(*args: Any) -> None:
        backward(*args)
        if dist.get_rank() == dist.get_world_size() - 1:
            for shard in variant.state()["f1.partition_0"].local_shards():
                shard.tensor.add_(0.001)

    variant.backward = wrong
    text = check(variant, traffic, 1).wrong
    assert text is not None
    assert text.startswith("rows of f1.partition_0 after a step, at "), text
    dist.destroy_process_group()


def test_rows_that_are_split_over_ranks_are_checked(tmp_path: Path) -> None:
    ranks = start_ranks(check_row_wise_tables, tmp_path, 2)
    assert ranks.exit_codes() == [0, 0], ranks.text()


def test_an_option_of_another_suite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        step.parsed(["--suite", "dlrm", "--scale", "0.5"])
    assert caught.value.code == 2
    assert "--scale with --suite dlrm; allowed: with dynamicemb" in capsys.readouterr().err


def test_tables_are_cut_to_what_a_rank_has_room_for() -> None:
    for gib, ranks in ((1, 1), (80, 1), (80, 8)):
        options = step.parsed(["--suite", "dlrm", "--max-gib", str(gib)])
        (cell,) = step_suites.cells_of(options, memory_gib=80, world_size=ranks, on_cpu=False)
        # Two full models lie there at once, one by each planner.
        stored = 2 * sum(cell.tables.sizes) * 128 * 4
        assert stored <= gib * ranks * 2**30
        assert max(cell.tables.sizes) == 40_000_000 or stored > 0.99 * gib * ranks * 2**30
