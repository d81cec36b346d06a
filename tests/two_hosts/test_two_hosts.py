"""A job on two hosts: what it comes to, and what becomes of it when the network between them fails."""

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen
from time import monotonic

import pytest
from run_metrics import metrics
from torchx_job import SMALL, SMALL_STEPS, started

from benchmarks.bridged_hosts import BridgedHost, bridged_hosts
from launch.waits import GLOO_TIMEOUT

pytestmark = pytest.mark.timeout(600)

Hosts = list[BridgedHost]
# Beyond the time-out of a collective: what torchrun takes to end what is left.
AT_MOST_S = GLOO_TIMEOUT.total_seconds() + 60


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with bridged_hosts(2) as both:
        yield both


def start(hosts: Hosts, runs: Path, stack: ExitStack) -> list[Popen[str]]:
    """Starts a node of one rank on each host."""
    nodes = []
    for number, host in enumerate(hosts):
        meet = ("--nnodes=2", f"--node-rank={number}", f"--master-addr={hosts[0].address}", "--master-port=29500")
        job = ("-m", "launch.train", "--config", "configs/demo.yaml", "--runs", str(runs), *SMALL)
        command = ("torch.distributed.run", "--nproc-per-node=1", *meet, *job)
        environment = {**host.environment, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        nodes.append(stack.enter_context(started(*command, within=host.prefix, **environment)))
    return nodes


def end(nodes: list[Popen[str]]) -> list[tuple[int, str, float]]:
    """Returns exit code, output from here on, and time of end of each node."""

    def follow(node: Popen[str]) -> tuple[int, str, float]:
        output, _ = node.communicate()
        return node.returncode, output, monotonic()

    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(follow, nodes))


@pytest.fixture(scope="module")
def unbroken(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("unbroken")
    with ExitStack() as stack:
        for code, output, _ in end(start(hosts, runs, stack)):
            assert code == 0, output
    return runs / "demo"


def test_two_hosts_train(unbroken: Path) -> None:
    last = metrics(unbroken)[-1]
    assert (last["split"], last["step"]) == ("test", SMALL_STEPS)
    assert last["dense_only_auc"] + 0.1 < last["auc"] < last["best_possible_auc"]


def test_a_link_that_fails_ends_the_job_on_both_and_it_goes_on_later(
    unbroken: Path, hosts: Hosts, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        nodes = start(hosts, tmp_path, stack)
        first = nodes[0].stdout
        assert first is not None
        assert any(re.search(rf" 35/{SMALL_STEPS}  logloss", line) for line in first)
        hosts[0].set_link("down")
        cut = monotonic()
        try:
            ended = end(nodes)
        finally:
            hosts[0].set_link("up")
    for code, output, at in ended:
        assert code == 1, output
        assert at - cut < AT_MOST_S
        assert "launch.train FAILED" in output
        assert "RuntimeError: " in output
    assert metrics(tmp_path / "demo")[-1]["split"] != "test"

    with ExitStack() as stack:
        (code, output, _), (other_code, other_output, _) = end(start(hosts, tmp_path, stack))
    assert code == 0, output
    assert other_code == 0, other_output
    (step,) = re.findall(r"continues at step (\d+), from ", output)
    assert int(step) in (30, 40, 50, 60)
    assert metrics(tmp_path / "demo") == metrics(unbroken)


def test_one_of_two_jobs_on_two_hosts_has_the_folder(hosts: Hosts, tmp_path: Path) -> None:
    def alone(host: BridgedHost, stack: ExitStack) -> Popen[str]:
        job = ("launch.train", "--config", "configs/demo.yaml", "--runs", str(tmp_path), *SMALL)
        # Processes are numbered anew, as on another host: neither job sees the other's.
        within = (*host.prefix, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
        return stack.enter_context(started(*job, within=within, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1"))

    with ExitStack() as stack:
        first = alone(hosts[0], stack)
        assert first.stdout is not None
        assert any(" 35/" in line for line in first.stdout)
        (job,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(job), signal.SIGSTOP)

        ((code, output, _),) = end([alone(hosts[1], stack)])
        assert code == 1, output
        (line,) = (line for line in output.splitlines() if "Error" in line)
        assert re.match(
            r"RunInUseError: \S+/demo is in use by process \d+ on \S+, which renewed its lock \d+ s ago", line
        )

        (lock,) = (tmp_path / "demo").glob("lock.*")
        os.utime(lock, (0, 0))  # as if the first one had been silent for long
        ((code, output, _),) = end([alone(hosts[1], stack)])
        assert code == 0, output
        assert "continues at step 30, from " in output
        ended = metrics(tmp_path / "demo")

        os.kill(int(job), signal.SIGCONT)
        ((code, output, _),) = end([first])
        assert code == 1, output
        assert f"RunInUseError: {tmp_path / 'demo'} is in use by another job, which took it over: process " in output
    assert metrics(tmp_path / "demo") == ended
    steps = [(line["split"], line["step"]) for line in ended]
    assert len(steps) == len(set(steps))
    assert steps[-1][0] == "test"
