"""The script of docs/cluster.md for `srun` starts ranks that find one another."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.local_ranks import free_port
from tests.launch.jobs import DEMO, SMALL
from tests.run_metrics import metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
# Slurm's `srun`, for this test: it starts two tasks on one node, each with its number.
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit
export SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""


@pytest.mark.slow
def test_the_script_for_srun(tmp_path: Path) -> None:
    (script,) = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL)
    settings = " ".join(f"--set={s}" for s in (*SMALL, "train.max_steps=2"))
    for before, after in (
        ("configs/mlperf_dcnv2_qr.yaml", f"{DEMO} {settings}"),
        ("/shared/runs", f"{tmp_path}/runs"),
        ("MASTER_PORT=29500", f"MASTER_PORT={free_port()}"),
        ("LOCAL_WORLD_SIZE=8", "LOCAL_WORLD_SIZE=2"),
        ("exec python", f"exec {sys.executable}"),
    ):
        assert script.count(before) == 1
        script = script.replace(before, after)
    for name, source in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n"), ("job", script)):
        (tmp_path / name).write_text(source)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "-1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NODELIST": "node1",
    }
    command = [str(tmp_path / "job")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 × 256 rows on cpu" in done.stdout
    assert metrics(tmp_path / "runs" / "demo")[-1]["split"] == "test"


def test_its_keys_and_functions_are_there() -> None:
    sections = (ROOT / "launch" / "sections.py").read_text()
    for key in set(re.findall(r"train\.(\w+)", PAGE)):
        assert re.search(rf"^    {key}: ", sections, re.MULTILINE), key
    for module in set(re.findall(r"torchrec_qr\.distributed\.(\w+)", PAGE)):
        assert (ROOT / "torchrec_qr" / "distributed" / f"{module}.py").is_file(), module
