"""A TorchX role that checks the scheduler's request before it is submitted."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.specs.finder import ComponentValidationException

from launch.job_variables import escape_references, export_in_shell

_MAX_WORKSPACE_MIB = 100
_NO_GPU = ("", "-1", "NoDevFiles")
# Read the config by the job's own code, if that is installed beside TorchX. Else the job alone reads it.
_READ_JOB = """
import sys
try:
    from launch.config import read_job
    from torchrec_qr.cli.schema import ConfigError
except ModuleNotFoundError:
    sys.exit()
try:
    read_job(sys.argv[1], sys.argv[2:])
except (ConfigError, OSError) as error:
    print(error)
    sys.exit(1)
"""


@dataclass
class CheckedRole(specs.Role):
    """A role that checks the scheduler's request, which shows more than the role, before it is submitted."""

    ranks: int = 1
    variables: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    overrides: list[str] = field(default_factory=list)
    runs: str | None = None

    def pre_proc(self, scheduler: str, dryrun_info: Any) -> Any:
        """Checks the request; TorchX calls it as soon as it has the scheduler. Nodes on this host share its cores.

        Raises:
            ComponentValidationException: ranks that would share GPUs; a config that the job would refuse; a copy of the
                workspace that is too large, or lacks the config; results that would be lost with the job.
        """
        request = dryrun_info.request
        if scheduler.startswith("local"):
            _check_shared_gpus(self, request)
            _share_cores(self, request)
            return dryrun_info
        if scheduler in ("ray", "slurm"):
            copied = request.working_dir if scheduler == "ray" else request.job_dir
            if copied is not None:
                _check_workspace(copied, self.config, scheduler == "ray")
        if scheduler == "slurm":
            export_in_shell(self.variables, request)
        if scheduler in ("ray", "kubernetes"):
            _check_runs(self, scheduler)
        if scheduler == "kubernetes":
            escape_references(self.variables, request)
        if scheduler == "kubernetes" and not self.image:
            raise ComponentValidationException("--image: none; allowed: an image with this project and its environment")
        if self.config is not None:
            _check_job(self.config, self.overrides)
        return dryrun_info


def _check_job(config: str, overrides: list[str]) -> None:
    """Reads the whole config, because a wrong key must not come to light hours later, at the end of a queue."""
    command = [sys.executable, "-c", _READ_JOB, config, *overrides]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    if read.returncode:
        # Take stdout first, because libraries print to stderr at their import. An unforeseen exception is there too.
        raise ComponentValidationException(f"--config {config}: {read.stdout.strip() or read.stderr.strip()}")


def _check_runs(role: CheckedRole, scheduler: str) -> None:
    """Checks that results outlive the job: these schedulers run it in a place that goes when the job goes."""
    if role.runs is None:
        return
    if not os.path.isabs(role.runs):
        raise ComponentValidationException(
            f"--runs {role.runs}: under {scheduler} it would go with the job. Allowed: an absolute path that all nodes "
            "see" + (", in one of --mounts" if scheduler == "kubernetes" else "")
        )
    mounted = [mount.dst_path for mount in role.mounts if hasattr(mount, "dst_path")]
    runs = Path(os.path.normpath(role.runs))
    if scheduler == "kubernetes" and not any(runs.is_relative_to(os.path.normpath(path)) for path in mounted):
        listed = ", ".join(mounted) or "none"
        raise ComponentValidationException(
            f"--runs {role.runs}: not in one of --mounts ({listed}), so it would go with the container. Allowed: a "
            "path in a mount, as --mounts type=volume,src=CLAIM,dst=/runs"
        )


def _check_shared_gpus(role: CheckedRole, request: Any) -> None:
    """Checks that each rank has a GPU of its own: nodes on one host see the same GPUs unless each gets its own."""
    visible = [_visible_gpus(replica.env) for replica in request.role_params[role.name]]
    if not any(visible):
        return
    fewest = min(len(devices) for devices in visible)
    if fewest < role.ranks:
        raise ComponentValidationException(
            f"-j {role.num_replicas}x{role.ranks}: {role.ranks} ranks see {fewest} GPUs. Allowed: a GPU each; none, by "
            "--env CUDA_VISIBLE_DEVICES=-1"
        )
    own = [device for devices in visible for device in devices]
    if len(own) > len(set(own)):
        raise ComponentValidationException(
            f"-j {role.num_replicas}x{role.ranks}: local nodes would share this host's GPUs. Allowed: one node, as "
            "-j 1xM; GPUs of its own for each node, by --gpu G and -cfg auto_set_cuda_visible_devices=True; none, by "
            "--env CUDA_VISIBLE_DEVICES=-1"
        )


def _share_cores(role: CheckedRole, request: Any) -> None:
    """Starts no more threads than cores, because threads wait for one another in busy loops."""
    if "OMP_NUM_THREADS" in role.variables:
        return
    share = max(1, len(os.sched_getaffinity(0)) // (role.num_replicas * role.ranks))
    for replica in request.role_params[role.name]:
        replica.env["OMP_NUM_THREADS"] = str(min(share, int(replica.env["OMP_NUM_THREADS"])))


def _visible_gpus(env: dict[str, str]) -> list[str]:
    """Returns the GPUs that a process of this host with these variables sees."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    there = re.findall(r"^GPU (\d+)", listed, re.MULTILINE)
    chosen = env.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if chosen is None or not there:
        return there
    return [] if chosen in _NO_GPU else chosen.split(",")


def _check_workspace(folder: str, config: str | None, temporary: bool) -> None:
    """Checks the copy of the workspace that TorchX has made for the scheduler, and drops it if it will not do."""
    sizes = dict(_sizes(folder))
    limit = _workspace_limit()
    problem = None
    if sum(sizes.values()) > limit * 2**20:
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
        listed = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in largest)
        problem = (
            f"the workspace has {sum(sizes.values()) / 2**20:.1f} MiB, and a copy of it goes to the cluster; allowed: "
            f"{limit:g} MiB. Largest: {listed}. Name in .torchxignore what the job does not need, or raise the "
            "environment variable TORCHX_MAX_WORKSPACE_MIB"
        )
    elif config is not None and (os.path.isabs(config) or not os.path.isfile(os.path.join(folder, config))):
        problem = (
            f"--config {config}: not in the copy of the workspace that goes to the cluster; allowed: a path relative "
            f"to {os.getcwd()}, inside of it, that .torchxignore does not name"
        )
    if problem is None:
        return
    if temporary and folder.startswith(tempfile.gettempdir()):
        shutil.rmtree(folder, ignore_errors=True)
    elif not temporary:
        problem += f". Remove {folder} before the next try: TorchX wants to make it"
    raise ComponentValidationException(problem)


def _workspace_limit() -> float:
    given = os.environ.get("TORCHX_MAX_WORKSPACE_MIB", str(_MAX_WORKSPACE_MIB))
    try:
        return float(given)
    except ValueError:
        raise ComponentValidationException(f"TORCHX_MAX_WORKSPACE_MIB={given}: allowed: a number of MiB") from None


def _sizes(folder: str) -> Iterator[tuple[str, int]]:
    """Yields each entry of a folder with the bytes in it."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield entry.name + "/", sum(size for _, size in _sizes(entry.path))
        else:
            yield entry.name, entry.stat(follow_symlinks=False).st_size
