"""The job of a fault drill: torchrun's elastic agents, one a host, each with its ranks of ``launch.train``."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep

from benchmarks.bridged_hosts import BridgedHost

RANKS_PER_HOST = 2
_ROOT = Path(__file__).parents[1]
_POLL_S = 0.05
# Ranks wait for one another for a third of a minute in a step, and for half a minute elsewhere. Agents find within
# seconds that another one is silent.
_SETTINGS = (
    "data.generator.rows=24000",
    "train.batch_size=64",
    "train.eval_batch_size=256",
    "train.log_every=1",
    "train.checkpoint_every=6",
    "train.eval_every=15",
    "train.timeout_minutes=0.33",
    "train.slow_timeout_minutes=0.5",
)
_RENDEZVOUS = (
    "join_timeout=35,last_call_timeout=6,read_timeout=15,heartbeat_timeout=5,"
    "keep_alive_interval=1,keep_alive_max_attempt=3"
)
# torchrun's own errors may have a name alone, such as RendezvousTimeoutError.
_ERROR = re.compile(r"\b\w+(?:Error|Exception)(?:: .+|$)|Signal \d+ \(SIG\w+\) received by PID \d+")


class DrilledJob:
    """Agents on ``hosts``, which go on as long as ``least`` of them meet.

    Args:
        hosts (Sequence[BridgedHost]): on which the job starts.
        runs (Path): folder of run folders.
        least (int): with fewer agents the job ends by an error.
        restarts (int): how often an agent starts its ranks again.
        seed (int): of the job.
        log (Path): folder for what the agents print.
    """

    def __init__(
        self, hosts: Sequence[BridgedHost], runs: Path, least: int, restarts: int, log: Path, seed: int = 0
    ) -> None:
        self.hosts, self.run = list(hosts), runs / "demo"
        self._outputs = [log / f"{host.address}.txt" for host in hosts]
        log.mkdir(parents=True)
        self._agents: list[subprocess.Popen[bytes]] = []
        for host, output in zip(hosts, self._outputs, strict=True):
            self._agents.append(self._agent(host, output, runs, f"{least}:{len(hosts)}", restarts, seed))

    def _agent(
        self, host: BridgedHost, output: Path, runs: Path, nodes: str, restarts: int, seed: int
    ) -> "subprocess.Popen[bytes]":
        # The first agent has the store in which all meet. It does not recognise itself by an address in a namespace.
        conf = f"--rdzv-conf={_RENDEZVOUS},is_host={int(host is self.hosts[0])}"
        meet = (f"--rdzv-endpoint={self.hosts[0].address}:29500", conf, "--rdzv-id=drill")
        elastic = (f"--nnodes={nodes}", f"--nproc-per-node={RANKS_PER_HOST}", f"--max-restarts={restarts}")
        quick = ("--monitor-interval=0.3", "--shutdown-timeout=10", f"--local-addr={host.address}")
        job = ("-m", "launch.train", "--config", "configs/demo.yaml", "--runs", str(runs))
        overrides = [f"--set={setting}" for setting in (*_SETTINGS, f"train.seed={seed}")]
        environment = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "-1",
            "PYTHONPATH": str(_ROOT),
            "PYTHONUNBUFFERED": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as `launch.components` starts jobs that may restart
        }
        # Number processes anew, because the lock of a run's folder then takes hosts for what they are.
        within = (*host.prefix, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d")
        with output.open("wb") as file:
            return subprocess.Popen(
                [*within, *torchrun, *meet, *elastic, *quick, *job, *overrides],
                cwd=_ROOT,
                env={**os.environ, **environment, **host.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def step(self) -> int:
        """The last step that the run has logged."""
        lines = _text(self.run / "metrics.jsonl").splitlines()
        steps = re.findall(r'^\{"step": (\d+)', lines[-1]) if lines else []
        return int(steps[0]) if steps else 0

    @property
    def has_ended(self) -> bool:
        return all(agent.poll() is not None for agent in self._agents)

    def wait_until_step(self, step: int, seconds: float) -> bool:
        """Returns whether the run comes to a step in that time, before it ends."""
        deadline = monotonic() + seconds
        while self.step < step and not self.has_ended and monotonic() < deadline:
            sleep(_POLL_S)
        return self.step >= step

    def wait(self, seconds: float) -> bool:
        """Returns whether all agents end in that time."""
        deadline = monotonic() + seconds
        while not self.has_ended and monotonic() < deadline:
            sleep(_POLL_S)
        return self.has_ended

    def exit_codes(self) -> list[int | None]:
        return [agent.poll() for agent in self._agents]

    def ranks(self, host: BridgedHost) -> list[int]:
        """Returns the processes on a host that are ranks."""
        return [pid for pid in host.processes() if _is_rank(pid)]

    def kill(self) -> list[int]:
        """Kills whatever is left on all hosts; returns what that was."""
        left = [pid for host in self.hosts for pid in host.processes()]
        for pid in left:
            end_at_once(pid)
        for agent in self._agents:
            agent.wait()
        return left

    def errors(self) -> list[str]:
        """Returns the errors that ranks and agents have printed, each once."""
        found = (_ERROR.search(line) for output in self._outputs for line in _text(output).splitlines())
        return list(dict.fromkeys(match[0] for match in found if match))

    def continued_at(self) -> list[int]:
        """Returns the steps from which ranks went on, in order."""
        found = (re.findall(r"continues at step (\d+), from", _text(output)) for output in self._outputs)
        return sorted({int(step) for steps in found for step in steps})


def end_at_once(pid: int) -> None:
    """Sends SIGKILL to a process, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _is_rank(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False
    return b"launch.train" in command and b"torch.distributed.run" not in command


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
