"""The components' requests to each scheduler, and what they refuse before anything is submitted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx.specs.finder import ComponentValidationException
from torchx_job import ROOT, dryrun, torchx, without_id

from benchmarks.step_suites import SUITES
from launch.train import main

DEMO = ("--config", "configs/demo.yaml")


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host on which ``nvidia-smi -L`` lists two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU 0: NVIDIA (UUID: GPU-1)\\nGPU 1: NVIDIA (UUID: GPU-2)\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ComponentValidationException) as caught:
        dryrun(*args, **kwargs)
    return str(caught.value)


def test_the_command_of_a_rank_on_this_host() -> None:
    request = dryrun("local_cwd", "dlrm", "-j", "1x2", "--env", "A=1", *DEMO, "--", "--set=a.b=c d").request
    (replica,) = request.role_params["dlrm"]
    assert replica.args[:2] == ["bash", "-c"]
    assert without_id(replica.args[2]) == (
        f"exec {shlex.quote(sys.executable)} -m torch.distributed.run --rdzv-backend=c10d --rdzv-id=dlrm-ID "
        "--rdzv-endpoint=localhost:0 --local-addr=localhost --nnodes=1 --nproc-per-node=2 --tee=3 --role= "
        "-m launch.train --config configs/demo.yaml --runs runs '--set=a.b=c d' >&2"
    )
    expected = {"A": "1", "OMP_NUM_THREADS": "1", "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${rank}] "}
    assert expected.items() <= replica.env.items()


def test_local_nodes_meet_at_the_port_that_was_given() -> None:
    args = ("-j", "2x3", "--cpu", "6", "--rdzv_port", "31234", "--python", "/env/bin/python", *DEMO)
    first, second = dryrun("local_cwd", "dlrm", *args).request.role_params["dlrm"]
    assert first.args == second.args
    assert "exec /env/bin/python -m torch.distributed.run" in first.args[2]
    assert "--rdzv-endpoint=${TORCHX_RANK0_HOST:=localhost}:31234" in first.args[2]
    assert "--nnodes=2 --nproc-per-node=3" in first.args[2]
    assert first.env["TORCHX_RANK0_HOST"] == "localhost"


def test_all_ranks_on_this_host_share_its_cores() -> None:
    def threads(*args: str) -> list[str]:
        request = dryrun("local_cwd", "dlrm", *DEMO, *args).request
        return [replica.env["OMP_NUM_THREADS"] for replica in request.role_params["dlrm"]]

    cores = len(os.sched_getaffinity(0))
    assert threads("-j", "1x1", "--cpu", "1000") == [str(cores)]
    assert threads("-j", f"{cores}x1", "--cpu", "1000") == ["1"] * cores
    assert threads("-j", "2x1", "--cpu", "1") == ["1", "1"]
    assert threads("-j", "2x1", "--cpu", "4", "--env", "OMP_NUM_THREADS=7") == ["7", "7"]


def test_retries_are_torchruns_where_the_scheduler_has_none() -> None:
    local = dryrun("local_cwd", "dlrm", "--max_retries", "3", *DEMO).request
    (replica,) = local.role_params["dlrm"]
    in_place = (
        "case $TORCHX_JOB_ID in local*|ray*) export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
        "PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-3};; esac; "
    )
    assert replica.args[2].startswith(in_place)
    assert replica.env["TORCHX_JOB_ID"].startswith("local_cwd://")


@pytest.mark.slow
def test_a_slurm_job_of_two_nodes_with_slurms_own_retries() -> None:
    args = ("-j", "2x4", "--cpu", "16", "--gpu", "4", "--memMB", "5000", "--max_retries", "3", *DEMO)
    request = dryrun("slurm", "dlrm", *args, cfg={"partition": "gpus", "time": "60"}).request
    assert request.max_retries == 3
    assert request.replicas["dlrm-1"].env["TORCHX_JOB_ID"].startswith("slurm://")
    script = request.materialize()
    for i in range(2):
        wanted = (
            f"#SBATCH --job-name=dlrm-{i} --requeue --partition=gpus --time=60 --ntasks-per-node=1 "
            "--cpus-per-task=16 --mem=5000 --gpus-per-task=4\n"
        )
        assert wanted in script
    assert script.count("--rdzv-endpoint=${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500") == 2
    assert script.count("--nnodes=2 --nproc-per-node=4") == 2
    assert script.count("OMP_NUM_THREADS=4") == 2


def test_the_volcano_job_of_two_nodes_is_the_stored_one() -> None:
    args = (
        *("-j", "2x8", "--cpu", "96", "--gpu", "8", "--memMB", "1000000", "--image", "registry.example/torchrec_qr:1"),
        *("--mounts", "type=volume,src=runs,dst=/runs", "--runs", "/runs", "--env", "NCCL_DEBUG=WARN"),
        *("--config", "configs/mlperf_dcnv2_qr.yaml", "--", "--set=train.seed=1"),
    )
    manifest = without_id(str(dryrun("kubernetes", "dlrm", *args, cfg={"queue": "default"})))
    stored = (Path(__file__).parent / "dlrm_2x8.volcano.yaml").read_text()
    assert yaml.safe_load(manifest) == yaml.safe_load(stored)


def test_bench_runs_the_benchmark_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("local_cwd", "bench") == f"benchmarks/step.py: not in {tmp_path}; allowed: TorchX in the checkout"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "step.py").write_text("")
    options = ("-j", "1x2", "--suite", "dlrm", "--", "--steps", "3")
    (replica,) = dryrun("local_cwd", "bench", *options).request.role_params["bench"]
    assert replica.args[2].endswith("--nproc-per-node=2 --tee=3 --role= -m benchmarks.step --suite dlrm --steps 3 >&2")


def test_bench_knows_the_suites_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert refusal("local_cwd", "bench", "--suite", "dlmr") == f"--suite dlmr: allowed: {', '.join(SUITES)}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("-j", "1x0"),
            "-j 1x0: allowed: NxM, N nodes of M ranks each, both 1 or more, as 1x2 for two ranks on one node",
        ),
        (("-j", "2"), "-j 2: allowed: NxM"),
        (("-j", "1x2x3"), "-j 1x2x3: allowed: NxM"),
        (("--cpu", "0"), "--cpu 0: allowed: 1 and more"),
        (("--gpu", "-1"), "--gpu -1: allowed: 0 and more"),
        (("--memMB", "0"), "--memMB 0: allowed: 1 and more"),
        (("--gpu", "1", "-j", "1x2"), "-j 1x2: 2 ranks on a node of 1 GPUs; allowed: a GPU each"),
        (("--max_retries", "-1"), "--max_retries -1: allowed: 0 and more"),
        (("--rdzv_port", "65536"), "--rdzv_port 65536: allowed: 1 to 65535"),
        (("--h", "p5"), "--h p5: No named resource found for `p5`. Registered"),
        (("--mounts", "type=bind,src=/a"), "--mounts type=bind,src=/a: dst; allowed: type=bind,src=/host,dst=/job"),
        (("--mounts", "src=/a,dst=/b"), "--mounts src=/a,dst=/b: type must be specified first; allowed"),
    ],
)
def test_wrong_options(args: tuple[str, ...], message: str) -> None:
    assert refusal("local_cwd", "dlrm", *DEMO, *args).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file, seen from "),
        (b"train: [", "not readable as YAML: while parsing"),
        (b"\xff\xff", "not readable as YAML: "),
        (b"- a\n- b\n", "allowed: a mapping of sections, as data, tables, train"),
    ],
)
def test_configs_that_are_none(text: bytes | None, message: str, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    if text is not None:
        config.write_bytes(text)
    assert refusal("local_cwd", "dlrm", "--config", str(config)).startswith(f"--config {config}: {message}")


def test_the_components_find_their_own_modules_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("tables: []")
    component = f"{ROOT / 'launch' / 'components.py'}:dlrm"
    # -P as TorchX's command: what lies in the working directory is no module.
    command = [sys.executable, "-P", "-m", "torchx.cli.main", "run", "-s", "local_cwd", "--dryrun", component]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out = subprocess.run(
        [*command, "--config", "job.yaml"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert "-m launch.train --config job.yaml" in out.stdout


def test_a_refused_job_is_told_and_gives_exit_code_1() -> None:
    code, output = torchx("run", "-s", "local_cwd", "launch/components.py:dlrm", *DEMO, "-j", "0x1")
    assert code == 1
    assert "-j 0x1: allowed: NxM, N nodes of M ranks each" in output
    assert "Traceback" not in output


def test_a_config_is_read_to_its_keys_before_it_waits_in_a_queue() -> None:
    wrong = ("--set=train.batchsize=3", "--set", "optimizer.sparse.lr=0", "--quiet")
    message = refusal("slurm", "dlrm", *DEMO, "--", *wrong)
    assert message.startswith("--config configs/demo.yaml: configs/demo.yaml: 2 errors")
    assert "train.batchsize: unknown key; did you mean 'batch_size'?" in message
    assert "optimizer.sparse.lr: 0; allowed: above 0" in message


@pytest.mark.usefixtures("two_gpus")
def test_local_ranks_have_a_gpu_each_or_none() -> None:
    shared = refusal("local_cwd", "dlrm", *DEMO, "-j", "2x1")
    assert shared.startswith("-j 2x1: local nodes would share this host's GPUs. Allowed: one node, as -j 1xM; GPUs of")
    assert refusal("local_cwd", "dlrm", *DEMO, "-j", "1x3").startswith(
        "-j 1x3: 3 ranks see 2 GPUs. Allowed: a GPU each"
    )
    own = {"auto_set_cuda_visible_devices": True}
    replicas = dryrun("local_cwd", "dlrm", *DEMO, "-j", "2x1", "--gpu", "1", cfg=own).request.role_params["dlrm"]
    assert [r.env["CUDA_VISIBLE_DEVICES"] for r in replicas] == ["0", "1"]
    for args in (("-j", "1x2"), ("-j", "2x3", "--env", "CUDA_VISIBLE_DEVICES=-1")):
        dryrun("local_cwd", "dlrm", *DEMO, *args)


def test_hosts_without_gpus_have_any_number_of_ranks() -> None:
    dryrun("local_cwd", "dlrm", *DEMO, "-j", "4x4", "--env", "CUDA_VISIBLE_DEVICES=-1")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("job.yaml", "left_out.yaml"):
        (folder / name).write_text((ROOT / "configs" / "demo.yaml").read_text())
    (folder / ".torchxignore").write_text("left_out.yaml\n")
    monkeypatch.chdir(folder)
    return folder


def test_a_workspace_that_is_too_large_stays_here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace / "data").mkdir()
    (workspace / "data" / "rows").write_bytes(bytes(3 * 2**20))
    args: tuple[str, ...] = ("slurm", "dlrm", "--config", "job.yaml")
    monkeypatch.setenv("TORCHX_MAX_WORKSPACE_MIB", "2")
    message = refusal(*args, cfg={"job_dir": str(workspace.parent / "job2")}, workspace=workspace)
    assert message.startswith(
        "the workspace has 3.0 MiB, and a copy of it goes to the cluster; allowed: 2 MiB. Largest: "
    )
    assert "Largest: data/ (3.0 MiB), job.yaml (0.0 MiB)" in message
    assert message.endswith(f"Remove {workspace.parent / 'job2'} before the next try: TorchX wants to make it")
    monkeypatch.setenv("TORCHX_MAX_WORKSPACE_MIB", "2M")
    message = refusal(*args, cfg={"job_dir": str(workspace.parent / "job3")}, workspace=workspace)
    assert message == "TORCHX_MAX_WORKSPACE_MIB=2M: allowed: a number of MiB"


def test_the_config_goes_along_with_the_workspace(workspace: Path) -> None:
    for number, config in enumerate(["left_out.yaml", str(workspace / "job.yaml")]):
        cfg = {"job_dir": str(workspace.parent / f"job{number}")}
        message = refusal("slurm", "dlrm", "--config", config, cfg=cfg, workspace=workspace)
        assert message.startswith(
            f"--config {config}: not in the copy of the workspace that goes to the cluster; allowed"
        )


def test_a_url_is_no_folder_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    expected = "--runs s3://bucket/runs: a URL; allowed: a folder that all nodes see"
    assert refusal("local_cwd", "dlrm", *DEMO, "--runs", "s3://bucket/runs") == expected
    with pytest.raises(SystemExit) as caught:
        main([*DEMO, "--runs", "s3://bucket/runs"])
    assert caught.value.code == 2
    assert (
        "argument --runs: s3://bucket/runs is a URL; allowed: a folder that all nodes see." in capsys.readouterr().err
    )
    assert not Path("s3:").exists()


def test_results_do_not_go_with_a_container() -> None:
    image = ("--image", "registry.example/torchrec_qr:1")
    cfg = {"queue": "default"}
    message = refusal("kubernetes", "dlrm", *DEMO, *image, cfg=cfg)
    assert message == (
        "--runs runs: under kubernetes it would go with the job. Allowed: an absolute path that all nodes see, in one "
        "of --mounts"
    )
    mounts = ("--mounts", "type=volume,src=runs,dst=/runs")
    message = refusal("kubernetes", "dlrm", *DEMO, *image, *mounts, "--runs", "/runs2", cfg=cfg)
    assert message.startswith(
        "--runs /runs2: not in one of --mounts (/runs), so it would go with the container. Allowed:"
    )
    message = refusal("kubernetes", "dlrm", *DEMO, *mounts, "--runs", "/runs/a", cfg=cfg)
    assert message == "--image: none; allowed: an image with this project and its environment"
