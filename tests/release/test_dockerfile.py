"""The image of a job: its parts by themselves, and its commands, carried out in a folder without Docker."""

import json
import re
import shlex
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
import yaml
from dockerfile_steps import ImageFolder, instructions
from torchx_job import dryrun

from torchrec_qr.ops.triton_compiler import _HOW

ROOT = Path(__file__).parents[2]
STEPS = instructions((ROOT / "Dockerfile").read_text())
IGNORE = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def rest_of(keyword: str) -> list[str]:
    return [rest for name, rest in STEPS if name == keyword]


def packages() -> set[str]:
    """Returns the Debian packages that the image installs."""
    install = re.search(r"apt-get install -y --no-install-recommends (.*?) &&", rest_of("RUN")[0])
    assert install is not None
    return set(install[1].split())


def test_instructions_join_continued_lines_and_drop_comments() -> None:
    text = "# a comment\nFROM x:1\nRUN a \\\n    # why\n    && b  c\n\nENV A=1 B=2\n"
    assert instructions(text) == [("FROM", "x:1"), ("RUN", "a && b c"), ("ENV", "A=1 B=2")]


def test_the_image_has_what_a_gpu_needs() -> None:
    """The first lookup on a GPU names these packages if they are missing; g++ builds the CPU kernels."""
    asked_for = set(re.findall(r"apt-get install ([\w-]+)", " ".join(_HOW.values())))
    assert asked_for == {"gcc", "python3-dev"}
    assert packages() == asked_for | {"g++", "python3", "python3-venv"}


def test_versions_are_installed_by_the_commands_of_make() -> None:
    make = subprocess.run(
        ["make", "-n", "-W", "requirements/base.txt", "install", "DEVICE=cuda"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    made = [line.partition(" install ")[2] for line in make.stdout.splitlines() if " -m pip install " in line]
    image = " ".join(rest_of("RUN")).replace("$DEVICE", "cuda")
    assert re.findall(r"python -m pip install (.*?)(?= &&| python | useradd |$)", image) == [
        re.sub(r"^(--disable-pip-version-check|-qq| )+", "", line) for line in made
    ]


def test_the_context_is_what_is_copied() -> None:
    copied = [source for rest in rest_of("COPY") for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    assert IGNORE[0] == "*"
    named = [line.removeprefix("!") for line in IGNORE if line.startswith("!")]
    assert named == list(dict.fromkeys(source.partition("/")[0] for source in copied))


def test_layers_that_change_seldom_come_first() -> None:
    targets = [rest.split()[-1] for rest in rest_of("COPY")]
    assert targets == ["requirements/", "./", "torchrec_qr/", "launch/", "benchmarks/", "configs/"]
    versions = {Path(source).stem for source in rest_of("COPY")[0].split()[:-1]}
    assert versions == {"base", "cpu", "cuda", "torchrec", "trio-2.13"}, "another file would rebuild the largest layer"


def test_the_job_is_no_root() -> None:
    assert rest_of("ARG")[-1] == "JOB_UID=1000"
    assert rest_of("USER") == ["$JOB_UID"]
    assert STEPS[-2][0] == "USER", "no step follows as root"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_make_an_image_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the packages and the user of Debian. No package index is asked: the exact versions are those of the
    environment that runs this test, or pip fails."""
    monkeypatch.chdir(ROOT)
    installed = {distribution.name.replace("_", "-") for distribution in distributions()}
    trio = "trio-" + ".".join(version("torch").split(".")[:2])
    left_out = [rest for rest in rest_of("RUN") if rest.startswith(("apt-get ", "useradd "))]
    assert len(left_out) == 2
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys._base_executable} "$@"\n')
    python.chmod(0o755)
    ignored = [Path(line).name for line in IGNORE[1:] if not line.startswith("!")]
    image = ImageFolder(tmp_path, ROOT, ignored, {"DEVICE": "cpu" if "fbgemm-gpu-cpu" in installed else "cuda"})
    image.variables = {"PATH": f"{python.parent}:/usr/bin:/bin", "PYTHONPATH": "", "PIP_NO_INDEX": "1"}
    image.variables["CUDA_VISIBLE_DEVICES"] = "-1"
    for keyword, rest in STEPS:
        if keyword in ("FROM", "USER", "CMD") or rest in left_out:
            continue
        image.carry_out(keyword, rest.replace("trio-2.13", trio))
        if rest.startswith("python3 -m venv"):
            image.run("python -m pip uninstall -qy setuptools")
            (site_packages,) = (tmp_path / "opt" / "venv").glob("lib/python3*/site-packages")
            (site_packages / "of_this_test.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    said = image.run(shlex.join(json.loads(rest_of("CMD")[0])))
    assert "Lookups on a CPU: kernels" in said
    assert f"{tmp_path}/opt/torchrec_qr/torchrec_qr/ops/_serving.so" in said
    for variable, value in job(tmp_path / "runs").items():
        image.variables[variable] = value
    image.run(image.variables.pop("COMMAND"))
    lines = (tmp_path / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["split"] == "test"


def job(runs: Path) -> dict[str, str]:
    """Returns variables of a pod of a small job on one rank, and under COMMAND its command."""
    arguments = ("--image", "i", "--mounts", f"type=volume,src=runs,dst={runs}", "--runs", str(runs))
    small = ("--", "--set=data.generator.rows=6000", "--set=train.batch_size=256")
    request = dryrun(
        "kubernetes", "dlrm", *arguments, "--config", "configs/demo.yaml", *small, cfg={"queue": "default"}
    )
    (task,) = yaml.safe_load(str(request))["spec"]["tasks"]
    (container,) = task["template"]["spec"]["containers"]
    return {entry["name"]: entry["value"] for entry in container["env"]} | {"COMMAND": shlex.join(container["command"])}
