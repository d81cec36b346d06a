"""Fault drills: eight gloo ranks on four hosts, of which ranks, links and hosts are lost at random times.

    python -m benchmarks.fault_drills --save

Hosts are network namespaces, so it needs root and iproute2. Each drill runs the demo, small, by torchrun's elastic
agents. A rank is killed, a link is cut, for some seconds or for good, or a host is lost with its agent and its ranks.
Every job must end within two minutes of the fault: well, on as many ranks or on those that are left, or by an error
that names what happened. Then it is started again on the hosts that are left, and must come to its end.

A run that had eight ranks all along has the metrics of a run without a fault, bit for bit. With fewer, each row of the
epoch is trained once, and the AUC is within those of undisturbed runs of several seeds. All checkpoints can be read,
and no process and no namespace is left.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from threading import Timer
from time import monotonic, sleep
from typing import Any, Literal, get_args

from benchmarks.bridged_hosts import BridgedHost, bridged_hosts, namespaces_left
from benchmarks.drill_checks import (
    Line,
    Undisturbed,
    broken_checkpoints,
    faults_of_a_complete_run,
    is_complete,
    last_deals,
    lines_of,
)
from benchmarks.drilled_job import RANKS_PER_HOST, DrilledJob, end_at_once
from benchmarks.machine import about

HOSTS = 4
LIMIT_S = 120.0
RESULTS = Path(__file__).parent / "results"
_RETRIES = 6  # of TCP, because torchrun's agents wait without a time-out for a store whose host is gone
_START_S = 25.0  # within which faults of the start come
Fault = Literal["rank killed", "link cut for a while", "link cut for good", "host lost"]
_FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass(frozen=True)
class Drill:
    """A fault, and the job that meets it.

    Args:
        fault (Fault): what happens.
        at (float): when: the share of the steps that are over; below 0 while the job starts.
        host (int): where.
        rank (int): which of the host's ranks is killed.
        seconds (float): after which a link that is cut for a while is back.
        least (int): hosts with which the job goes on by itself.
        restarts (int): how often an agent starts its ranks again.
    """

    fault: Fault
    at: float
    host: int
    rank: int
    seconds: float
    least: int
    restarts: int

    def __str__(self) -> str:
        when = f"at {self.at:.0%} of the steps" if self.at >= 0 else f"{self.start_s:.1f} s after the start"
        what = f"{self.fault} on host {self.host}"
        what += f" for {self.seconds:.1f} s" if self.fault == "link cut for a while" else ""
        return f"{what} {when}, --nnodes={self.least}:{HOSTS} --max-restarts={self.restarts}"

    @property
    def start_s(self) -> float:
        """Seconds after the start of the job, of a fault while it starts."""
        return (1 + self.at / 0.2) * _START_S


def planned(number: int, seed: int) -> list[Drill]:
    """Returns drills with equally many faults of each kind, all else being drawn.

    Example:
        >>> sorted(drill.fault for drill in planned(4, seed=0))
        ['host lost', 'link cut for a while', 'link cut for good', 'rank killed']
        >>> planned(8, seed=1) == planned(8, seed=1)
        True
    """
    draw = random.Random(seed)
    faults = [_FAULTS[i % len(_FAULTS)] for i in range(number)]
    draw.shuffle(faults)
    return [
        Drill(
            fault=fault,
            at=draw.uniform(-0.2, 0.95),
            host=draw.randrange(HOSTS),
            rank=draw.randrange(RANKS_PER_HOST),
            seconds=draw.uniform(1, 30),
            # Have as many hosts come back after a rank has died, because all of them are there.
            least=HOSTS if fault == "rank killed" else draw.choice([HOSTS - 1, HOSTS]),
            restarts=draw.choice([0, 2]),
        )
        for fault in faults
    ]


@dataclass
class Outcome:
    """The end of a job.

    Attributes:
        drill (Drill): the fault.
        step (int): that the run had logged when it came.
        ended_s (float): seconds from the fault to the end of all agents.
        went_on (bool): whether the job came to its good end by itself.
        errors (list[str]): that its ranks and agents printed.
        continued_at (list[int]): steps from which ranks went on.
        again_on (int): ranks that the job was started again on; 0: it was not.
        deals (list[tuple[int, int]]): ranks and batches by which the epoch was trained.
        auc (float): on the test split.
        wrong (list[str]): in what it is not as it must be.
    """

    drill: Drill
    step: int = 0
    ended_s: float = 0.0
    went_on: bool = False
    errors: list[str] | None = None
    continued_at: list[int] | None = None
    again_on: int = 0
    deals: list[tuple[int, int]] | None = None
    auc: float = float("nan")
    wrong: list[str] | None = None

    def __str__(self) -> str:
        ended = "went on" if self.went_on else "ended by an error"
        again = f", started again on {self.again_on} ranks" if self.again_on else ""
        deals = ", then ".join(f"{ranks} ranks {batches} batches" for ranks, batches in self.deals or [])
        first = f" [{self.errors[0][:110]}]" if self.errors else ""
        verdict = "; ".join(self.wrong or []) or "as it must be"
        return (
            f"{self.drill}: step {self.step}, {ended} in {self.ended_s:.0f} s{first}{again}; "
            f"{deals}; AUC {self.auc:.4f}; {verdict}"
        )


def drilled(drill: Drill, undisturbed: Undisturbed, folder: Path) -> Outcome:
    """Runs a job, with its fault, to the end."""
    outcome, wrong = Outcome(drill, errors=[], continued_at=[], deals=[], wrong=[]), []
    runs = folder / "runs"
    run = runs / "demo"
    with bridged_hosts(HOSTS, retries=_RETRIES) as hosts:
        job = DrilledJob(hosts, runs, drill.least, drill.restarts, folder / "first", undisturbed.seed)
        try:
            _wait_for(drill, job, undisturbed)
            outcome.step, began = job.step, monotonic()
            left, back = _strike(drill, job)
            if not job.wait(LIMIT_S):
                wrong.append(f"after {LIMIT_S:.0f} s agents are there: {job.exit_codes()}")
            outcome.ended_s = monotonic() - began
            if back is not None:
                back.cancel()
                job.hosts[drill.host].set_link("up")
        finally:
            wrong += [f"process {pid} was left" for pid in job.kill()]
        outcome.errors, outcome.continued_at = job.errors(), job.continued_at()
        outcome.went_on = is_complete(lines_of(run))
        if not outcome.went_on:
            if not outcome.errors:
                wrong.append("no error names what happened")
            wrong += broken_checkpoints(run)
            outcome.again_on = len(left) * RANKS_PER_HOST
            wrong += _started_again(left, runs, folder, undisturbed.seed)
    wrong += [f"namespace {name} is left" for name in namespaces_left()]
    if is_complete(lines := lines_of(run)):
        outcome.auc, (outcome.deals, _) = lines[-1]["auc"], last_deals(run)
        wrong += faults_of_a_complete_run(run, undisturbed)
    outcome.wrong = wrong
    return outcome


def _wait_for(drill: Drill, job: DrilledJob, undisturbed: Undisturbed) -> None:
    if drill.at < 0:
        sleep(drill.start_s)
        return
    steps = max(1.0, drill.at * undisturbed.lines[-2]["step"])
    if job.wait_until_step(int(steps), LIMIT_S):
        sleep(steps % 1 * 0.3)  # somewhere in the step


def _strike(drill: Drill, job: DrilledJob) -> tuple[list[BridgedHost], Timer | None]:
    """Brings the fault about; returns the hosts that are left, and what sets a link up again."""
    host = job.hosts[drill.host]
    others = [other for other in job.hosts if other is not host]
    match drill.fault:
        case "rank killed":
            while not (ranks := job.ranks(host)[drill.rank :]) and not job.has_ended:
                sleep(0.05)  # the agents are meeting
            end_at_once(ranks[0])
            return job.hosts, None
        case "link cut for a while":
            host.set_link("down")
            back = Timer(drill.seconds, lambda: host.set_link("up"))
            back.start()
            return job.hosts, back
        case "link cut for good":
            host.set_link("down")
        case "host lost":
            host.lose_link()
            for pid in host.processes():
                end_at_once(pid)
    return others, None


def _started_again(hosts: list[BridgedHost], runs: Path, folder: Path, seed: int) -> list[str]:
    """Starts the job again, on hosts that are left, to its end; returns what is wrong."""
    job = DrilledJob(hosts, runs, len(hosts), 0, folder / "again", seed)
    wrong = []
    try:
        if not job.wait(LIMIT_S):
            wrong.append(f"started again, agents are there after {LIMIT_S:.0f} s: {job.exit_codes()}")
        elif any(job.exit_codes()):
            wrong.append(f"started again, it ended with {job.exit_codes()}: {job.errors()}")
    finally:
        wrong += [f"process {pid} was left" for pid in job.kill()]
    return wrong


def undisturbed_runs(seeds: int, folder: Path, at_once: int) -> Undisturbed:
    """Runs the job without a fault under several seeds. The drills take the seed whose AUC is in the middle."""
    with ProcessPoolExecutor(at_once) as pool:
        of_seed = dict(enumerate(pool.map(_undisturbed_run, range(seeds), repeat(folder))))
    auc = {seed: lines[-1]["auc"] for seed, lines in of_seed.items()}
    print("AUC of undisturbed seeds:", ", ".join(f"{value:.4f}" for value in auc.values()), flush=True)
    middle = sorted(auc, key=auc.__getitem__)[len(auc) // 2]
    return Undisturbed(HOSTS * RANKS_PER_HOST, middle, of_seed[middle], auc)


def _undisturbed_run(seed: int, folder: Path) -> list[Line]:
    at = folder / f"seed_{seed}"
    with bridged_hosts(HOSTS, retries=_RETRIES) as hosts:
        job = DrilledJob(hosts, at / "runs", HOSTS, 0, at / "log", seed)
        try:
            job.wait(LIMIT_S)
        finally:
            left = job.kill()
    lines = lines_of(job.run)
    if left or not is_complete(lines):
        raise RuntimeError(f"the job without a fault, seed {seed}: {left} left; {job.errors()}")
    return lines


def report(arguments: argparse.Namespace, undisturbed: Undisturbed, outcomes: list[Outcome]) -> dict[str, Any]:
    """Returns what the log has."""
    return {
        "machine": about(),
        "seed": arguments.seed,
        "at_once": arguments.at_once,
        "hosts": HOSTS,
        "ranks_per_host": RANKS_PER_HOST,
        "auc_of_seeds": undisturbed.auc,
        "seed_of_drills": undisturbed.seed,
        "log": [f"{number:2}  {outcome}" for number, outcome in enumerate(outcomes, 1)],
        "drills": [asdict(outcome) for outcome in outcomes],
    }


def outcomes_of(drills: list[Drill], undisturbed: Undisturbed, folder: Path, at_once: int) -> Iterator[Outcome]:
    folders = [folder / f"drill_{number}" for number in range(1, len(drills) + 1)]
    # Use processes, because hosts have the names of theirs. While one job waits for time-outs, another one computes.
    with ProcessPoolExecutor(at_once) as pool:
        yield from pool.map(drilled, drills, repeat(undisturbed), folders)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drills", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5, help="runs without a fault")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--at-once", type=int, default=2, help="drills that run at the same time")
    parser.add_argument("--folder", type=Path, help="keep runs and outputs there; default: a folder that is removed")
    parser.add_argument("--save", action="store_true", help="write the log to benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        undisturbed = undisturbed_runs(arguments.seeds, folder, arguments.at_once)
        drills = planned(arguments.drills, arguments.seed)
        outcomes: list[Outcome] = []
        for outcome in outcomes_of(drills, undisturbed, folder, arguments.at_once):
            outcomes.append(outcome)
            print(f"{len(outcomes):2}  {outcome}", flush=True)
            if arguments.save:
                path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}_fault_drills.json"
                path.write_text(json.dumps(report(arguments, undisturbed, outcomes), indent=1) + "\n")
    failed = sum(bool(outcome.wrong) for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} drills ended as they must")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
