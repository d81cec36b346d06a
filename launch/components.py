"""The jobs of this project as TorchX components: ``torchx run -s SCHEDULER launch/components.py:dlrm --config FILE``.

TorchX executes the text of this file among the names of its finder, and reads signatures from its syntax tree. Hence:
no import of torch, no names that could hide one of TorchX's, and annotations in the forms of ``typing`` that TorchX 0.7
knows.
"""

# ruff: noqa: E402, UP006, UP035, UP045

import os
import re
import shlex
import sys
from itertools import zip_longest
from typing import Any, List, Optional, Tuple

import yaml
from torchx import specs
from torchx.specs.finder import ComponentValidationException

# TorchX's command does not search the checkout for modules, and ``__file__`` is here that of the finder. Take the path
# of this file from the finder, because TorchX 0.7 gives it nowhere else.
_FILE = getattr(sys._getframe(1).f_locals.get("self"), "_filepath", __file__)
_CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(_FILE)))
if _CHECKOUT not in sys.path:
    sys.path.insert(0, _CHECKOUT)

from launch.checked_role import CheckedRole
from launch.job_variables import parsed_variables

_SUITES = ("headline", "grid", "hosts", "nodes", "dlrm", "dynamicemb", "tbe")


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
        suite: what is measured: headline, grid, hosts, nodes, dlrm, dynamicemb or tbe
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
) -> CheckedRole:
    nodes, ranks = _nodes_and_ranks(j)
    if 0 < node.gpu < ranks:
        raise ComponentValidationException(f"-j {j}: {ranks} ranks on a node of {node.gpu} GPUs; allowed: a GPU each")
    if max_retries < 0:
        raise ComponentValidationException(f"--max_retries {max_retries}: allowed: 0 and more")
    if not 0 < rdzv_port < 65536:
        raise ComponentValidationException(f"--rdzv_port {rdzv_port}: allowed: 1 to 65535")
    # Do not start torchrun by its name, because the environment's bin may not be on PATH.
    launcher = shlex.join([python or ("python" if image else sys.executable), "-m", "torch.distributed.run"])
    # The schedulers name the first node by a variable of their own, which the job's shell expands. On one node any free
    # port does, and its name need not be one that it can resolve.
    endpoint = "localhost:0 --local-addr=localhost"
    if nodes > 1:
        endpoint = f"$${{{specs.macros.rank0_env}:=localhost}}:{rdzv_port}"
    rendezvous = f"--rdzv-backend=c10d --rdzv-id={specs.macros.app_id} --rdzv-endpoint={endpoint}"
    arguments = shlex.join([f"--nnodes={nodes}", f"--nproc-per-node={ranks}", "--tee=3", "--role=", "-m", *module])
    # Send all to stderr, because TorchX shows nothing else from Slurm, and lines of one stream keep their order.
    shell = f"exec {launcher} {rendezvous} {arguments} >&2"
    if max_retries:
        shell = _restarts_in_place(max_retries) + shell
    variables = parsed_variables(env)
    defaults = {
        "OMP_NUM_THREADS": str(max(1, node.cpu // ranks)),
        "PYTHONUNBUFFERED": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[$${rank}] ",
    }
    return CheckedRole(
        name=name,
        image=image,
        entrypoint="bash",
        args=["-c", shell],
        # Double each "$", because TorchX fills templates in values.
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


def _restarts_in_place(max_retries: int) -> str:
    """Makes torchrun start the ranks again if the scheduler has no retries; with both, N would mean (N + 1)² - 1.

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
