"""``torchrec-qr plan``: the text that it prints, the file that it writes, and its errors."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from torchrec_qr.cli.commands import main
from torchrec_qr.cli.schema import read_tables

ROOT = Path(__file__).parents[1]
MLPERF = str(ROOT / "configs" / "mlperf_dcnv2_qr.yaml")
SMALL = """
tables:
  - {name: user, num_embeddings: 40_000_000, embedding_dim: 128,
     partitions: {kind: quotient_remainder, num_collisions: 4}}
  - {name: item, num_embeddings: 5_000_000, embedding_dim: 128, partitions: {kind: mixed_radix, balanced: true}}
  - {name: country, num_embeddings: 250, embedding_dim: 128}
planner: {topology: 1x4, device: h100, batch_size: 2048, constraints: {user: {pooling_factor: 20}}}
optimizer: {sparse: {name: adagrad}}
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(SMALL)
    return str(path)


def test_the_plan_is_printed_in_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", MLPERF, "--topology", "2x8", "--device", "h100", "--hbm-gib", "80"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].endswith("26 tables on 2x8 h100")
    assert "80 GiB, 15% of it reserved; batch 8192 a rank; tables stepped by adagrad" in lines[1]
    bars = [re.fullmatch(r" +(\d+)  (█+) .*", line) for line in lines]
    ranks = [m for m in bars if m is not None]
    assert [int(m[1]) for m in ranks] == list(range(16))
    assert max(len(m[2]) for m in ranks) == 24
    assert sum(line.startswith("cat_") for line in lines) == 26
    assert sum("all-to-all" in line and line.startswith("    ") for line in lines) == 26
    # 26,135,627,264 values of 4 bytes uncompressed, with as many of Adagrad on three ranks of 68 GiB.
    (full,) = [line.split() for line in lines if line.startswith("full ")]
    assert full[1:3] == ["26,135,627,264", "97.36"]
    assert full[-1] == "3"


@pytest.mark.slow
def test_the_command_runs_from_what_is_installed(small: str, tmp_path: Path) -> None:
    """It has the files of a wheel and its entry point, but neither the sources nor ``launch``."""
    lib = tmp_path / "lib"
    build = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "build_py", "-d", str(lib)]
    subprocess.run(build, cwd=ROOT, check=True)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["torchrec-qr"].split(":")
    code = (
        f"import sys; from {module} import {function}; print(sys.modules[{module!r}].__file__); sys.exit({function}())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "plan", "--config", small],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(lib)},
        capture_output=True,
        text=True,
        check=True,
    )
    file, head, *_ = run.stdout.splitlines()
    assert Path(file).is_relative_to(lib)
    assert head == f"{small}: 3 tables on 1x4 h100"


def test_the_plan_is_written_for_machines(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "--config", small, "--json", str(file), "--compare", "full,hash,qr"]) == 0
    devices = json.loads(file.read_text())["devices"]
    assert list(devices) == ["h100"]
    plan = devices["h100"]
    assert plan["request"] == {
        "device": "h100",
        "world_size": 4,
        "local_world_size": 4,
        "hbm_gib": 80.0,
        "storage_reserve": 0.15,
        "batch_size": 2048,
        "optimizer": "adagrad",
        "sharding_group_size": None,
        "inter_host_allreduce": False,
        "constraints": {"user": dict.fromkeys(plan["request"]["constraints"]["user"]) | {"pooling_factor": 20.0}},
    }
    assert re.fullmatch("[0-9a-f]{64}", plan["fingerprint"])
    assert (plan["feasible"], plan["error"], plan["sync"]) == (True, None, None)
    assert [rank["rank"] for rank in plan["ranks"]] == [0, 1, 2, 3]
    assert plan["peak_bytes"] == max(rank["peak_bytes"] for rank in plan["ranks"])
    assert [table["name"] for table in plan["tables"]] == ["user", "item", "country"]
    user = plan["tables"][0]
    assert (user["num_embeddings"], user["physical_rows"]) == (40_000_000, 10_000_004)
    rows = 10_000_004 + plan["tables"][1]["physical_rows"] + 250
    assert plan["totals"] == {"bytes_full": 45_000_250 * 512, "bytes": rows * 512}
    assert list(plan["compare"]) == ["full", "hash", "qr"]
    assert plan["compare"]["full"] == {"bytes": 45_000_250 * 512, "feasible": True, "fewest_ranks": 1}
    assert sum(rank["value_bytes"] for rank in plan["ranks"]) >= plan["totals"]["bytes"]
    assert sum(rank["peak_bytes"] for rank in plan["ranks"]) >= 2 * plan["totals"]["bytes"]  # with Adagrad's state
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[-4:]] == ["as", "full", "hash", "qr"]


def test_a_plan_that_does_not_fit_ends_with_code_1_and_says_what_would_help(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "--config", small, "--topology", "1x2", "--hbm-gib", "2", "--json", str(file)]) == 1
    captured = capsys.readouterr()
    assert "no plan fits: table 'user' needs" in captured.err
    assert "more compression: QuotientRemainder(num_collisions=" in captured.err
    assert re.search(r"more ranks: \d+ \(\d+x2\), now 2", captured.err)
    plan = json.loads(file.read_text())["devices"]["h100"]
    assert (plan["feasible"], plan["ranks"], plan["tables"], plan["peak_bytes"]) == (False, [], [], None)
    assert "no plan fits" in plan["error"]
    assert "does not fit" in captured.out


@pytest.mark.slow
def test_several_devices_have_a_column_each(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, alone = tmp_path / "plan.json", tmp_path / "h200.json"
    # 2 % of an H200's 141 GiB hold the tables, and 2 % of an A100's 80 GiB do not.
    reserved = tmp_path / "reserved.yaml"
    reserved.write_text(SMALL.replace("planner: {", "planner: {storage_reserve: 0.98, "))
    command = ["plan", "--config", str(reserved), "--json"]
    assert main([*command, str(alone), "--device", "h200"]) == 0
    capsys.readouterr()
    assert main([*command, str(file), "--device", "a100,h200"]) == 1
    captured = capsys.readouterr()
    head, *lines = captured.out.splitlines()
    assert head.endswith("3 tables on 1x4 a100, h200")
    assert max(map(len, lines)) <= 100
    cells = {line[:25].strip(): re.split(" {2,}", line[25:].strip()) for line in lines}
    plans = json.loads(file.read_text())["devices"]
    assert list(plans) == ["a100", "h200"]
    assert ["a100", "h200"] in [re.split(" {2,}", line.strip()) for line in lines]
    assert cells["plan"] == ["does not fit", "fits"]
    assert [plan["feasible"] for plan in plans.values()] == [False, True]
    assert cells["step ms"] == ["-", f"{plans['h200']['step_ms']:.3f}"]
    assert cells["GiB of the fullest rank"] == ["-", f"{plans['h200']['peak_bytes'] / 2**30:.2f}"]
    for table in plans["h200"]["tables"]:
        assert cells[table["name"]][0] == "-"
        assert cells[table["name"]][1].startswith(table["sharding_type"])
    assert captured.err.startswith("torchrec-qr plan: a100: no plan fits: table 'user' needs")
    assert plans["h200"] == json.loads(alone.read_text())["devices"]["h200"]


def test_variants_are_compared_for_each_device(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", small, "--device", "a100,h100", "--compare", "full"]) == 0
    out = capsys.readouterr().out
    tables = [part.splitlines() for part in out.split("\n\n")[-2:]]
    assert [part[0] for part in tables] == ["a100", "h100"]
    assert all([line.split()[0] for line in part[1:]] == ["tables", "as", "full"] for part in tables)


def test_fit_prints_tables_that_fit_with_least_compression(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = ["--topology", "1x2", "--hbm-gib", "4"]
    assert main(["plan", "--config", small, *cluster, "--fit"]) == 0
    out = capsys.readouterr().out
    threshold = re.search(r"# Threshold ([\d,]+) rows: (\d) of 3 tables have more, and keep as many\.", out)
    assert threshold is not None
    rows = int(threshold[1].replace(",", ""))
    fitted = tmp_path / "fitted.yaml"
    fitted.write_text(out)
    user, item, country = read_tables(fitted)
    assert user.physical_rows <= rows < 40_000_000  # type: ignore[union-attr]
    # The largest first: the smaller ones only down to the same number of rows.
    assert item.num_embeddings <= rows or item.physical_rows <= rows  # type: ignore[union-attr]
    assert not hasattr(country, "partitions")
    job = yaml.safe_load(SMALL) | yaml.safe_load(out)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(job))
    assert main(["plan", "--config", str(again), *cluster]) == 0
    # One percent more rows do not fit.
    more = user.bound_partitions.sizes[1]  # type: ignore[union-attr]
    job["tables"][0]["partitions"] = {"kind": "quotient_remainder", "num_collisions": max(2, int(more * 0.98) - 1)}
    again.write_text(yaml.safe_dump(job))
    capsys.readouterr()
    assert main(["plan", "--config", str(again), *cluster]) == (1 if more > 2 else 0)


def test_tables_of_hashed_ids_are_planned_and_keep_their_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, file = tmp_path / "job.yaml", tmp_path / "plan.json"
    hashed = "num_embeddings: 1_099_511_627_776, embedding_dim: 64, id_hash: splitmix64, hash_seed: 3"
    job.write_text(
        f"""
tables:
  - {{name: three, {hashed}, partitions: {{kind: mixed_radix, num_partitions: 3, rows: 40_000}}}}
  - {{name: two, {hashed}, partitions: {{kind: quotient_remainder, num_collisions: 1_000_000}}}}
  - {{name: item, num_embeddings: 50_000_000, embedding_dim: 64}}
planner: {{topology: 1x2, device: h100, batch_size: 512, hbm_gib: 4}}
"""
    )
    assert main(["plan", "--config", str(job), "--hbm-gib", "40", "--json", str(file), "--compare", "full,qr"]) == 0
    plan = json.loads(file.read_text())["devices"]["h100"]
    rows = {table["name"]: table["physical_rows"] for table in plan["tables"]}
    assert rows == {"three": 40_000, "two": 1_099_512 + 1_000_000, "item": 50_000_000}
    assert plan["totals"]["bytes_full"] == plan["totals"]["bytes"] == sum(rows.values()) * 256
    assert {variant["bytes"] for variant in plan["compare"].values()} == {sum(rows.values()) * 256}
    capsys.readouterr()
    assert main(["plan", "--config", str(job), "--fit"]) == 0
    out = capsys.readouterr().out
    assert "# Tables of hashed ids keep their rows: three, two" in out
    fitted = tmp_path / "fitted.yaml"
    fitted.write_text(out)
    before, after = read_tables(job), read_tables(fitted)
    assert list(after)[:2] == list(before)[:2]
    assert 2**20 < after[2].physical_rows < 50_000_000  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "0x8"], r"planner\.topology: '0x8'; allowed: '<nodes>x<ranks per node>'"),
        (["--device", "tpu"], r"--device tpu: 'tpu' is unknown; allowed: cpu, a100, h100, h200"),
        (["--device", "h100,tpu"], r"--device h100,tpu: 'tpu' is unknown; allowed: cpu, a100, h100, h200"),
        (["--device", "h100,a100", "--fit"], r"--fit --device h100,a100; allowed: one device"),
        (["--sharding-group-size", "3"], r"--sharding-group-size 3; allowed: a divisor of the 4 ranks"),
        (["--sharding-group-size", "0"], r"--sharding-group-size 0; allowed: a divisor of the 4 ranks"),
        (["--inter-host-allreduce"], r"--inter-host-allreduce; allowed: beside --sharding-group-size"),
        (["--hbm-gib", "-80"], r"planner\.hbm_gib: -80\.0; allowed: above 0"),
        (["--batch-size", "0"], r"planner\.batch_size: 0; allowed: at least 1"),
        (["--optimizer", "lion"], r"optimizer\.sparse\.name: 'lion'; allowed: sgd"),
        (["--compare", "full,half"], r"--compare full,half: 'half' is unknown; allowed: full, hash, qr"),
    ],
)
def test_bad_input_is_named(small: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["plan", "--config", small, *arguments]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_bad_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("tables: []\nplanner: {topology: 1x2, device: cpu, batch_size: 8}")
    assert main(["plan", "--config", str(path)]) == 2
    assert "tables: []; allowed: at least one table" in capsys.readouterr().err
    table = "tables: [{name: t, num_embeddings: 100, embedding_dim: 8}]\n"
    path.write_text(f"{table}planner: {{topology: 1x2, device: cpu, batch_size: 8, constraints: {{u: {{}}}}}}")
    assert main(["plan", "--config", str(path)]) == 2
    assert "planner.constraints.u: no such table; allowed: t" in capsys.readouterr().err
    path.write_text(f"{table}planner: {{topology: 1x2, device: cpu}}")
    assert main(["plan", "--config", str(path)]) == 2
    assert "planner.batch_size: missing; give it, or --batch-size" in capsys.readouterr().err
    assert main(["plan", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
