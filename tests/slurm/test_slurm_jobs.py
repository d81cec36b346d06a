"""Jobs on a real Slurm cluster of two nodes: what they come to, what TorchX shows, and how they fail and go on."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_metrics import metrics
from torchx_job import ROOT, SMALL_STEPS, dlrm, output_of, output_though_rank_1_dies, torchx

from benchmarks.local_ranks import free_port

pytestmark = pytest.mark.timeout(600)

SLURM = "-s slurm -cfg partition=debug,time=10 --wait --log"
# The nodes are one host: a core for each rank, not the cores that they claim to have.
SIZE = ("--cpu", "1", "--memMB", "1500")


@pytest.fixture(autouse=True, scope="module")
def logs() -> Iterator[None]:
    """Removes what Slurm writes to where a job was submitted."""
    yield
    for file in ROOT.glob("slurm-*"):
        file.unlink()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one node."""
    runs = tmp_path_factory.mktemp("unbroken")
    code, output = output_of(*dlrm(SLURM, runs, "-j", "1x2", *SIZE))
    assert code == 0, output
    assert re.search(r"^dlrm/0 \[0\] test AUC +0\.\d{4}", output, re.MULTILINE)
    return runs / "demo"


def test_one_node_of_two_ranks(unbroken: Path) -> None:
    last = metrics(unbroken)[-1]
    assert (last["split"], last["step"]) == ("test", SMALL_STEPS)
    assert last["dense_only_auc"] + 0.1 < last["auc"] < last["best_possible_auc"]


def test_two_nodes_of_one_rank(unbroken: Path, tmp_path: Path) -> None:
    code, output = output_of(*dlrm(SLURM, tmp_path, "-j", "2x1", "--rdzv_port", str(free_port()), *SIZE))
    assert code == 0, output
    (handle,) = set(re.findall(r"^slurm://torchx/(\d+)$", output, re.MULTILINE))
    last, expected = metrics(tmp_path / "demo")[-1], metrics(unbroken)[-1]
    assert last["logloss"] == pytest.approx(expected["logloss"], abs=0.01)
    assert last["auc"] == pytest.approx(expected["auc"], abs=0.02)
    code, status = torchx("status", f"slurm://torchx/{handle}")
    assert code == 0
    assert "SUCCEEDED" in status


def test_a_job_that_fails_is_told(tmp_path: Path) -> None:
    # Larger than what a float holds after the first step.
    code, output = output_of(*dlrm(SLURM, tmp_path, "-j", "1x2", *SIZE), "--set=optimizer.sparse.lr=1e30")
    assert code == 1
    assert "Job finished: FAILED" in output
    assert "NonFiniteLossError: step " in output


def test_a_job_that_dies_is_queued_again_and_comes_to_the_same_end(unbroken: Path, tmp_path: Path) -> None:
    output_though_rank_1_dies(SLURM, tmp_path, *SIZE)
    assert len(list((tmp_path / "demo" / "tensorboard").glob("events.*"))) == 2  # it did start twice
    assert metrics(tmp_path / "demo") == metrics(unbroken)


def test_variables_reach_the_job(tmp_path: Path) -> None:
    values = {"A": "1,2", "B": "=x=", "C": 'it\'s "$HOME"', "D": ""}
    program = tmp_path / "python"
    print_them = f"import os; print({{n: os.environ.get(n) for n in {list(values)}}})"
    program.write_text(f"#!/bin/sh\nexec {shlex.join([sys.executable, '-c', print_them])}\n")
    program.chmod(0o755)
    env = ",".join(f"{name}={value}" for name, value in values.items())
    code, output = output_of(*dlrm(SLURM, tmp_path, *SIZE, "--env", env, "--python", str(program)))
    assert code == 0, output
    assert str(values) in output
