"""The commands of README, docs/launch.md and docs/cluster.md are ones that the components take."""

import re
import shlex
from pathlib import Path

import pytest
from torchx_job import ROOT, dryrun

LAUNCH = ROOT / "docs" / "launch.md"
PAGES = (ROOT / "README.md", LAUNCH)
CLUSTER = ROOT / "docs" / "cluster.md"


def commands(page: Path) -> list[str]:
    """Returns the commands of a page's shell blocks that run a component, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "launch/components.py:" in line]


@pytest.mark.parametrize("command", [line for page in (*PAGES, CLUSTER) for line in commands(page)])
def test_the_component_takes_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    (at,) = (i for i, word in enumerate(words) if word.startswith("launch/components.py:"))
    # This host has neither GPUs nor a cluster; test_components.py tests what concerns those.
    component = words[at].partition(":")[2]
    request = dryrun("local_cwd", component, *words[at + 1 :], "--env", "CUDA_VISIBLE_DEVICES=-1").request
    nodes, ranks = words[words.index("-j") + 1].split("x")
    assert len(request.role_params[component]) == int(nodes)
    assert f"--nproc-per-node={ranks}" in request.role_params[component][0].args[2]


def test_every_scheduler_has_its_command() -> None:
    schedulers = {re.findall(r"-s (\w+)", command)[0] for command in commands(LAUNCH)}
    assert schedulers == {"local_cwd", "slurm", "ray", "kubernetes"}
