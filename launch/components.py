"""The jobs of this project as TorchX components: ``torchx run -s SCHEDULER launch/components.py:dlrm --config FILE``.

TorchX executes this file by path, inside a module of its own, and reads signatures from its syntax tree. Hence: no
import of this project or of torch, no names that could hide one of TorchX's, and annotations in the forms of ``typing``
that TorchX 0.7 knows.
"""

# ruff: noqa: UP006, UP035, UP045

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Dict, Iterator, List, Optional, Tuple

import yaml
from torchx import specs
from torchx.specs.finder import ComponentValidationException

_MAX_WORKSPACE_MIB = 100
_NO_GPU = ("", "-1", "NoDevFiles")
_SUITES = ("headline", "grid", "hosts", "dlrm", "dynamicemb", "tbe")
# A comma ends a variable if the next one begins behind it, unless a backslash stands before the comma.
_VARIABLE_ENDS = re.compile(r"(?<!\\),(?=[A-Za-z_][A-Za-z0-9_]*=)")
_VARIABLE_BEHIND_SPACES = re.compile(r"(?<!\\),\s+[A-Za-z_][A-Za-z0-9_]*=")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VALUE_OF_SRUN = re.compile(r"[A-Za-z0-9_@%+=:./-]*")
# Read by the job's own code, where that is installed beside TorchX; where it is not, the job itself reads its config.
_READ_JOB = """
import sys
try:
    from launch.config import read_job
    from torchrec_qr.schema import ConfigError
except ModuleNotFoundError:
    sys.exit()
try:
    read_job(sys.argv[1], sys.argv[2:])
except (ConfigError, OSError) as error:
    print(error)
    sys.exit(1)
"""


def dlrm(
    *args: str,
    config: str,
    j: str = "1x1",
    runs: str = "runs",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    image: str = "",
    env: str = "",
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
    python: str = "",
) -> specs.AppDef:
    """Trains the job of a config: launch.train on N nodes of M ranks.

    Args:
        args: further arguments of launch.train, after ``--``; write ``--set=model.embedding_dim=32``, as TorchX refuses
            an option that is given twice
        config: the job's YAML; a path inside of the workspace where the scheduler copies that
        j: NxM, nodes times ranks per node
        runs: the folder of run folders, which all nodes must see, and which must outlive the job
        h: a named resource of TorchX for each node, instead of cpu, gpu and memMB
        cpu: CPUs of a node
        gpu: GPUs of a node; 0, or one for each rank at least
        memMB: memory of a node in MB
        image: container image, where the scheduler runs containers
        env: environment variables of the job, NAME=VALUE,NAME=VALUE; a comma separates only if NAME= follows, and one
            that is part of a value all the same is written with a backslash before it
        max_retries: how often a failed job starts again, from its last checkpoint
        mounts: mounts of the container, as type=bind,src=/host,dst=/job[,readonly]
        rdzv_port: port of the first node at which the nodes of a job meet; unused on one node
        python: the Python that runs the job; by default the one that runs TorchX, and in an image its ``python``
    """
    _check_config(config)
    if "://" in runs:
        raise ComponentValidationException(f"--runs {runs}: a URL; allowed: a folder that all nodes see")
    command = ["launch.train", "--config", config, "--runs", runs, *args]
    node = _resource(h, cpu, gpu, memMB)
    role = _role("dlrm", command, j, node, image, env, max_retries, mounts, rdzv_port, python)
    role.config, role.overrides, role.runs = config, _overrides(args), runs
    return specs.AppDef(name="dlrm", roles=[role])


def bench(
    *args: str,
    suite: str = "headline",
    j: str = "1x1",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    image: str = "",
    env: str = "",
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
    python: str = "",
) -> specs.AppDef:
    """Measures step times: benchmarks.step on N nodes of M ranks.

    Args:
        args: arguments of benchmarks.step, after ``--``
        suite: what is measured: headline, grid, hosts, dlrm, dynamicemb or tbe
        j: NxM, nodes times ranks per node
        h: a named resource of TorchX for each node, instead of cpu, gpu and memMB
        cpu: CPUs of a node
        gpu: GPUs of a node; 0, or one for each rank at least
        memMB: memory of a node in MB
        image: container image, where the scheduler runs containers
        env: environment variables of the job, NAME=VALUE,NAME=VALUE; a comma separates only if NAME= follows, and one
            that is part of a value all the same is written with a backslash before it
        mounts: mounts of the container, as type=bind,src=/host,dst=/job[,readonly]
        rdzv_port: port of the first node at which the nodes of a job meet; unused on one node
        python: the Python that runs the job; by default the one that runs TorchX, and in an image its ``python``
    """
    if not os.path.isfile("benchmarks/step.py"):
        raise ComponentValidationException(f"benchmarks/step.py: not in {os.getcwd()}; allowed: TorchX in the checkout")
    if suite not in _SUITES:
        raise ComponentValidationException(f"--suite {suite}: allowed: {', '.join(_SUITES)}")
    node = _resource(h, cpu, gpu, memMB)
    role = _role(
        "bench", ["benchmarks.step", "--suite", suite, *args], j, node, image, env, 0, mounts, rdzv_port, python
    )
    return specs.AppDef(name="bench", roles=[role])


@dataclass
class _CheckedRole(specs.Role):
    """A role that checks what only the scheduler's request shows, before it is submitted."""

    ranks: int = 1
    variables: Dict[str, str] = field(default_factory=dict)
    config: Optional[str] = None
    overrides: List[str] = field(default_factory=list)
    runs: Optional[str] = None

    def pre_proc(self, scheduler: str, dryrun_info: Any) -> Any:
        """Called by TorchX once the scheduler is known. On this host, the ranks of all nodes share its cores.

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
            _export_in_shell(self.variables, request)
        if scheduler in ("ray", "kubernetes"):
            _check_runs(self, scheduler)
        if scheduler == "kubernetes":
            _escape_references(self.variables, request)
        if scheduler == "kubernetes" and not self.image:
            raise ComponentValidationException("--image: none; allowed: an image with this project and its environment")
        if self.config is not None:
            _check_job(self.config, self.overrides)
        return dryrun_info


def _role(
    name: str,
    module: List[str],
    j: str,
    node: specs.Resource,
    image: str,
    env: str,
    max_retries: int,
    mounts: Optional[List[str]],
    rdzv_port: int,
    python: str,
) -> _CheckedRole:
    nodes, ranks = _nodes_and_ranks(j)
    if 0 < node.gpu < ranks:
        raise ComponentValidationException(f"-j {j}: {ranks} ranks on a node of {node.gpu} GPUs; allowed: a GPU each")
    if max_retries < 0:
        raise ComponentValidationException(f"--max_retries {max_retries}: allowed: 0 and more")
    if not 0 < rdzv_port < 65536:
        raise ComponentValidationException(f"--rdzv_port {rdzv_port}: allowed: 1 to 65535")
    # Not torchrun: it is found only where the environment's bin is on PATH.
    launcher = shlex.join([python or ("python" if image else sys.executable), "-m", "torch.distributed.run"])
    # The schedulers name the first node by a variable of their own, which the job's shell expands. On one node any free
    # port does, and its name need not be one that it can resolve.
    endpoint = "localhost:0 --local-addr=localhost"
    if nodes > 1:
        endpoint = f"$${{{specs.macros.rank0_env}:=localhost}}:{rdzv_port}"
    rendezvous = f"--rdzv-backend=c10d --rdzv-id={specs.macros.app_id} --rdzv-endpoint={endpoint}"
    arguments = shlex.join([f"--nnodes={nodes}", f"--nproc-per-node={ranks}", "--tee=3", "--role=", "-m", *module])
    # All to stderr: from Slurm TorchX shows nothing else, and of one stream the lines keep their order.
    shell = f"exec {launcher} {rendezvous} {arguments} >&2"
    if max_retries:
        shell = _restarts_in_place(max_retries) + shell
    variables = _variables(env)
    defaults = {
        "OMP_NUM_THREADS": str(max(1, node.cpu // ranks)),
        "PYTHONUNBUFFERED": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[$${rank}] ",
    }
    return _CheckedRole(
        name=name,
        image=image,
        entrypoint="bash",
        args=["-c", shell],
        # TorchX fills templates in values: "$$" is its "$".
        env={**defaults, **{name: value.replace("$", "$$") for name, value in variables.items()}},
        num_replicas=nodes,
        min_replicas=nodes,
        max_retries=max_retries,
        resource=node,
        port_map={"c10d": rdzv_port} if nodes > 1 else {},
        mounts=_mounts(mounts),
        ranks=ranks,
        variables=variables,
    )


def _variables(text: str) -> Dict[str, str]:
    """Returns the variables of ``--env``. TorchX's own parser drops what a value begins with, and splits at more."""
    variables: Dict[str, str] = {}
    for pair in _VARIABLE_ENDS.split(text) if text else []:
        name, equals, value = pair.partition("=")
        if not equals or _VARIABLE_NAME.fullmatch(name) is None:
            raise ComponentValidationException(
                f"--env {text}: {pair!r}; allowed: NAME=VALUE,NAME=VALUE, names of letters, digits and _"
            )
        if name in variables:
            raise ComponentValidationException(f"--env {text}: {name} is given twice; allowed: once")
        if _VARIABLE_BEHIND_SPACES.search(value):
            raise ComponentValidationException(
                f"--env {name}: {value!r} has what looks like another variable, behind a space; allowed: none, or a "
                "backslash before a comma that is part of the value"
            )
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ComponentValidationException(f"--env {name}: {value!r} is not UTF-8; allowed: text")
        variables[name] = value.replace("\\,", ",")
    return variables


def _export_in_shell(variables: Dict[str, str], request: Any) -> None:
    """Has the job's shell set what srun's ``--export`` would take apart: it splits at commas, and removes quotes."""
    hard = {name: value for name, value in variables.items() if _VALUE_OF_SRUN.fullmatch(value) is None}
    for replica in request.replicas.values():
        # TorchX puts the job's id where it finds its macro, which in a value is text.
        quoted = {name: shlex.quote(value).replace("${app_id}", "${app''_id}") for name, value in hard.items()}
        exports = "".join(f"export {name}={value}; " for name, value in quoted.items())
        replica.env = {name: value for name, value in replica.env.items() if name not in hard}
        replica.args[1] = exports + replica.args[1]


def _escape_references(variables: Dict[str, str], request: Any) -> None:
    """Kubernetes fills in ``$(NAME)`` in values, and reads ``$$`` as ``$``."""
    for task in request.resource["spec"]["tasks"]:
        for container in task["template"].spec.containers:
            for variable in container.env:
                if variable.name in variables:
                    variable.value = variable.value.replace("$", "$$")


def _restarts_in_place(max_retries: int) -> str:
    """Has torchrun start the ranks again where the scheduler has no retries; with both, N would mean (N + 1)² - 1.

    The ranks then need a store of their own: in that of torchrun they find the addresses of those that have died.
    """
    return (
        "case $$TORCHX_JOB_ID in local*|ray*) export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
        f"PET_MAX_RESTARTS=$${{PET_MAX_RESTARTS:-{max_retries}}};; esac; "
    )


def _resource(h: Optional[str], cpu: int, gpu: int, memory_mb: int) -> specs.Resource:
    for name, value, least in (("cpu", cpu, 1), ("gpu", gpu, 0), ("memMB", memory_mb, 1)):
        if value < least:
            raise ComponentValidationException(f"--{name} {value}: allowed: {least} and more")
    try:
        return specs.resource(cpu=cpu, gpu=gpu, memMB=memory_mb, h=h)
    except KeyError as error:
        raise ComponentValidationException(f"--h {h}: {error.args[0]}") from None


def _nodes_and_ranks(j: str) -> Tuple[int, int]:
    """Returns (N, M) of NxM."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", j)
    if match is None:
        raise ComponentValidationException(
            f"-j {j}: allowed: NxM, N nodes of M ranks each, both 1 or more, as 1x2 for two ranks on one node"
        )
    return int(match[1]), int(match[2])


def _mounts(mounts: Optional[List[str]]) -> List[Any]:
    try:
        return list(specs.parse_mounts(mounts)) if mounts else []
    except (KeyError, ValueError, AssertionError) as error:
        text = ",".join(mounts or [])
        raise ComponentValidationException(
            f"--mounts {text}: {error.args[0]}; allowed: type=bind,src=/host,dst=/job[,readonly], one after the other"
        ) from None


def _overrides(args: Tuple[str, ...]) -> List[str]:
    """Returns the values of ``--set`` in arguments of launch.train."""
    given: List[str] = []
    for option, following in zip_longest(args, args[1:], fillvalue=""):
        if option.startswith("--set="):
            given.append(option.partition("=")[2])
        elif option == "--set":
            given.append(following)
    return given


def _check_config(config: str) -> None:
    if not os.path.isfile(config):
        raise ComponentValidationException(f"--config {config}: no such file, seen from {os.getcwd()}")
    try:
        with open(config, encoding="utf-8") as f:
            sections = yaml.safe_load(f)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ComponentValidationException(f"--config {config}: not readable as YAML: {error}") from None
    if not isinstance(sections, dict):
        raise ComponentValidationException(f"--config {config}: allowed: a mapping of sections, as data, tables, train")


def _check_job(config: str, overrides: List[str]) -> None:
    """Reads the whole config: a wrong key must not come to light hours later, at the end of a queue."""
    command = [sys.executable, "-c", _READ_JOB, config, *overrides]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    if read.returncode:
        # Libraries print to stderr at their import, and so would an exception that nobody foresaw.
        raise ComponentValidationException(f"--config {config}: {read.stdout.strip() or read.stderr.strip()}")


def _check_runs(role: _CheckedRole, scheduler: str) -> None:
    """These schedulers run a job in a place that goes when the job goes."""
    if role.runs is None:
        return
    if not os.path.isabs(role.runs):
        raise ComponentValidationException(
            f"--runs {role.runs}: under {scheduler} it would go with the job. Allowed: an absolute path that all nodes "
            "see" + (", in one of --mounts" if scheduler == "kubernetes" else "")
        )
    mounted = [mount.dst_path for mount in role.mounts if hasattr(mount, "dst_path")]
    if scheduler == "kubernetes" and not any(_is_within(role.runs, path) for path in mounted):
        listed = ", ".join(mounted) or "none"
        raise ComponentValidationException(
            f"--runs {role.runs}: not in one of --mounts ({listed}), so it would go with the container. Allowed: a "
            "path in a mount, as --mounts type=volume,src=CLAIM,dst=/runs"
        )


def _is_within(path: str, folder: str) -> bool:
    return os.path.commonpath([os.path.normpath(path), os.path.normpath(folder)]) == os.path.normpath(folder)


def _check_shared_gpus(role: _CheckedRole, request: Any) -> None:
    """Nodes on one host see the same GPUs, unless each is given its own; a rank needs one of its own."""
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


def _share_cores(role: _CheckedRole, request: Any) -> None:
    """Threads wait for one another in busy loops: where they are more than cores, a job takes several times longer."""
    if "OMP_NUM_THREADS" in role.variables:
        return
    share = max(1, len(os.sched_getaffinity(0)) // (role.num_replicas * role.ranks))
    for replica in request.role_params[role.name]:
        replica.env["OMP_NUM_THREADS"] = str(min(share, int(replica.env["OMP_NUM_THREADS"])))


def _visible_gpus(env: Dict[str, str]) -> List[str]:
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


def _check_workspace(folder: str, config: Optional[str], temporary: bool) -> None:
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


def _sizes(folder: str) -> Iterator[Tuple[str, int]]:
    """Yields each entry of a folder with the bytes in it."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield entry.name + "/", sum(size for _, size in _sizes(entry.path))
        else:
            yield entry.name, entry.stat(follow_symlinks=False).st_size
