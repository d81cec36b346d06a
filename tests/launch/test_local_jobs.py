"""Jobs on this host: under torchrun, under TorchX on one node and on two, with a rank that fails, and one that dies."""

import json
import re
from pathlib import Path
from time import monotonic

import pytest
from click_rows import click_rows, tsv_lines, write_tsv
from numpy.random import default_rng
from run_metrics import metrics
from torchx_job import SMALL, SMALL_STEPS, dlrm, output_of, output_though_rank_1_dies, started

from benchmarks.local_ranks import free_port

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that plain torchrun starts: what all others must come to."""
    runs = tmp_path_factory.mktemp("torchrun")
    two_ranks = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    job = ("-m", "launch.train", "--config", "configs/demo.yaml", "--runs", str(runs), *SMALL)
    code, output = output_of(*two_ranks, *job)
    assert code == 0, output
    return runs / "demo"


@pytest.mark.slow
def test_torchrun_alone_trains(unbroken: Path) -> None:
    lines = metrics(unbroken)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(5, SMALL_STEPS, 5))
    assert [line["step"] for line in lines if line["split"] == "validation"] == [40, SMALL_STEPS]
    last = lines[-1]
    assert last["split"] == "test"
    assert last["dense_only_auc"] + 0.1 < last["auc"] < last["best_possible_auc"]
    assert last["ne"] < 0.9
    logged = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert all(line["samples_per_s"] > 0 for line in logged if line["split"] != "validation")


@pytest.mark.slow
def test_two_nodes_on_this_host(unbroken: Path, tmp_path: Path) -> None:
    code, output = output_of(*dlrm("-s local_cwd", tmp_path, "-j", "2x1", "--rdzv_port", str(free_port())))
    assert code == 0, output
    # Nodes of one rank get another plan: other initial weights, and sums in another order.
    last, expected = metrics(tmp_path / "demo")[-1], metrics(unbroken)[-1]
    assert last["best_possible_auc"] == expected["best_possible_auc"]
    assert last["logloss"] == pytest.approx(expected["logloss"], abs=0.01)
    assert last["auc"] == pytest.approx(expected["auc"], abs=0.02)


@pytest.mark.slow
def test_a_job_whose_rank_dies_comes_to_the_same_end_and_is_shown(unbroken: Path, tmp_path: Path) -> None:
    output = output_though_rank_1_dies("-s local_cwd", tmp_path)
    (resumed,) = re.findall(r"continues at step (\d+), from (\S+)", output)
    assert resumed[0] in ("30", "40", "50", "60")
    assert resumed[1] == str(tmp_path / "demo" / "checkpoints" / f"step_{resumed[0]}")
    assert metrics(tmp_path / "demo") == metrics(unbroken)
    lines = output.splitlines()
    assert any(re.match(r"dlrm/0 \[0\] .* 26 tables", line) for line in lines)
    shown = [re.match(rf"dlrm/0 \[0\] \|#* *\| +(\d+)/{SMALL_STEPS}  logloss", line) for line in lines]
    assert {int(found[1]) for found in shown if found} == set(range(5, SMALL_STEPS, 5))
    assert any(re.match(r"dlrm/0 \[0\] test AUC +0\.\d{4}", line) for line in lines)


def test_the_exception_of_one_rank_ends_all_and_is_shown(tmp_path: Path) -> None:
    rows = tsv_lines(click_rows(default_rng(0), 3000))
    rows[2000] = "7" + rows[2000][1:]  # of the train split's second half, which only rank 1 reads
    file = write_tsv(tmp_path / "train.txt", rows)
    data = ("--set=data.format=criteo_tsv", f"--set=data.files=[{file}]", "--set=data.ids=modulo")
    seen = 0.0
    lines = []
    with started(*dlrm("-s local_cwd", tmp_path, "-j", "1x2"), *data) as job:
        assert job.stdout is not None
        for line in job.stdout:
            lines.append(line)
            if "DataError" in line:
                seen = seen or monotonic()
        output = "".join(lines)
        assert job.wait() == 1, output
    assert monotonic() - seen < 30
    assert f"[1] DataError: {file}:2001: label is '7'; allowed: 0, 1" in output
    assert "[1] Traceback" not in output
    assert re.search(r"Root Cause .*?rank +: 1 ", output, re.DOTALL)
    shown = output[output.index("structured_error_msg") :]
    assert re.search(rf"\n +message: 'DataError: {file}:2001:\s+label is ''7'';\s+allowed: 0, 1'", shown)
