"""Jobs on a real Ray head: what they come to, what TorchX shows, and what it refuses to send there."""

import re
import shutil
from pathlib import Path

import pytest
from run_metrics import metrics
from torchx.specs.finder import ComponentValidationException
from torchx_job import ROOT, SMALL_STEPS, dlrm, dryrun, output_of

pytestmark = pytest.mark.timeout(600)

RAY = "-s ray -cfg dashboard_address=127.0.0.1:8265 --wait --log"


def test_one_node_of_two_ranks(tmp_path: Path) -> None:
    code, output = output_of(*dlrm(RAY, tmp_path, "-j", "1x2"))
    assert code == 0, output
    assert re.search(r"^ray://torchx/127\.0\.0\.1:8265-dlrm-\w+$", output, re.MULTILINE)
    assert "Job finished: SUCCEEDED" in output
    last = metrics(tmp_path / "demo")[-1]
    assert (last["split"], last["step"]) == ("test", SMALL_STEPS)
    assert last["dense_only_auc"] + 0.1 < last["auc"] < last["best_possible_auc"]


def test_a_job_that_fails_is_told(tmp_path: Path) -> None:
    code, output = output_of(*dlrm(RAY, tmp_path, "-j", "1x2"), "--set=optimizer.sparse.lr=1e30")
    assert code == 1
    assert "Job finished: FAILED" in output


def test_what_is_sent_is_small_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    request = dryrun("ray", "dlrm", "--config", "configs/demo.yaml", "--runs", "/runs", workspace=ROOT).request
    sent = Path(request.working_dir)
    assert sum(file.stat().st_size for file in sent.rglob("*") if file.is_file()) < 5 * 2**20
    assert {"launch", "torchrec_qr", "configs"} <= {entry.name for entry in sent.iterdir()}
    shutil.rmtree(sent)
    with pytest.raises(ComponentValidationException) as caught:
        dryrun("ray", "dlrm", "--config", "configs/demo.yaml", workspace=ROOT)
    assert str(caught.value).startswith("--runs runs: under ray it would go with the job. Allowed: an absolute path")


def test_variables_are_sent_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    values = {"A": "1,2", "B": "=x=", "C": 'it\'s "$HOME" ${app_id}\n$$', "D": ""}
    env = ",".join(f"{name}={value}" for name, value in values.items())
    job = ("--config", "configs/demo.yaml", "--runs", "/runs", "--env", env)
    request = dryrun("ray", "dlrm", *job, workspace=ROOT).request
    shutil.rmtree(request.working_dir)
    (actor,) = request.actors
    assert values.items() <= actor.env.items()
