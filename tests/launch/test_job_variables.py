"""Variables of ``--env`` reach the job as they were written, whatever is in them, by every scheduler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.specs.finder import ComponentValidationException
from torchx_job import COMPONENTS, ROOT, dryrun, torchx

DEMO = ("--config", "configs/demo.yaml")
VALUES = {
    "COMMAS": "a,b=c,,d",
    "EQUALS": "=x==y=",
    "SEMICOLONS": "a;B=2;",
    "QUOTES": """it's "so" `date` 'q'""",
    "DOLLARS": "$HOME $$ ${app_id} $(EMPTY) ${replica_id}",
    "BACKSLASHES": r"\n\\ \x",
    "LINES": "one\n#SBATCH --two\nthree",
    "SPACES": "  a  b ",
    "EMPTY": "",
    "TEXT": "größer ≥ 3",
    "LAST": "'\"",
}
ENV = ",".join(f"{name}={value.replace(',', chr(92) + ',')}" for name, value in VALUES.items())


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def variables(component: str, env: str) -> dict[str, str]:
    """Returns what the component makes of ``--env``."""
    arguments = DEMO if component == "dlrm" else ()
    (replica,) = dryrun("local_cwd", component, "--env", env, *arguments).request.role_params[component]
    return dict(replica.env)


@pytest.mark.parametrize("component", ["dlrm", "bench"])
def test_each_value_is_as_it_was_written(component: str) -> None:
    assert VALUES.items() <= variables(component, ENV).items()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("A=1,B=2", {"A": "1", "B": "2"}),
        ("A=1,2,B=3", {"A": "1,2", "B": "3"}),
        (r"A=1\,B=3", {"A": "1,B=3"}),
        ("A==1,B==", {"A": "=1", "B": "="}),
        ("A=,B=''", {"A": "", "B": "''"}),
        ("A=1,", {"A": "1,"}),
        ("A=x y,3z=1", {"A": "x y,3z=1"}),
    ],
)
def test_a_comma_separates_if_a_name_follows(env: str, expected: dict[str, str]) -> None:
    assert expected.items() <= variables("dlrm", env).items()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("A", "--env A: 'A'; allowed: NAME=VALUE,NAME=VALUE, names of letters, digits and _"),
        ("3=1", "--env 3=1: '3=1'; allowed"),
        ("=1", "--env =1: '=1'; allowed"),
        ("A=1,A=2", "--env A=1,A=2: A is given twice; allowed: once"),
        ("A=1, B=2", "--env A: '1, B=2' has what looks like another variable, behind a space; allowed: none, or"),
        ("A=\udcff", "--env A: '\\udcff' is not UTF-8; allowed: text"),
    ],
)
def test_what_is_no_variable_is_refused(env: str, message: str) -> None:
    with pytest.raises(ComponentValidationException) as caught:
        variables("dlrm", env)
    assert str(caught.value).startswith(message)


# Prints the variables in place of the job: the component's shell runs it as ``PYTHON -m torch.distributed.run ...``.
def printing(folder: Path) -> Path:
    program = folder / "python"
    (folder / "print.py").write_text(
        f"import os, pathlib\n"
        f"values = {{n: os.environ.get(n) for n in {list(VALUES)}}}\n"
        f"print(values)\n"
        f"pathlib.Path({str(folder / 'printed')!r}).write_text(str(values), encoding='utf-8')\n"
    )
    program.write_text(f"#!/bin/sh\nexec {sys.executable} {folder / 'print.py'}\n")
    program.chmod(0o755)
    return program


def test_a_job_on_this_host_has_them(tmp_path: Path) -> None:
    job = (f"{COMPONENTS}:dlrm", *DEMO, "--env", ENV, "--python", str(printing(tmp_path)))
    code, output = torchx("run", "-s", "local_cwd", *job)
    assert code == 0, output
    # Read the file, because TorchX may leave out what a job prints just before it ends.
    assert (tmp_path / "printed").read_text(encoding="utf-8") == str(VALUES)


def test_the_script_of_slurm_gives_them_to_the_job(tmp_path: Path) -> None:
    job = ("--env", ENV, "--python", str(printing(tmp_path)))
    request = dryrun("slurm", "bench", *job, cfg={"partition": "gpus", "time": "60"}).request
    script = tmp_path / "script"
    script.write_text(request.materialize())
    (tmp_path / "srun").write_text(_SRUN)
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=True)
    assert f"\n{VALUES}\n" in done.stderr


# Gives variables to the job as Slurm's does: it splits --export at commas, and sets each pair.
_SRUN = f"""#!{sys.executable}
import os, sys
options = [a for a in sys.argv[1:] if a.startswith("--")]
(export,) = [o.partition("=")[2] for o in options if o.startswith("--export=")]
first, *pairs = export.split(",")
assert first == "ALL" and not set(export) & set("'\\"")
os.environ.update(pair.split("=", 1) for pair in pairs)
command = sys.argv[1 + sys.argv[1:].index("bash"):]
os.execvp(command[0], command)
"""


def test_the_pods_of_kubernetes_have_them() -> None:
    request = dryrun("kubernetes", "bench", "--image", "i", "--env", ENV, cfg={"queue": "default"}).request
    (task,) = request.resource["spec"]["tasks"]
    (container,) = task["template"].spec.containers
    given = {variable.name: variable.value for variable in container.env}
    assert {name: as_kubelet(given[name]) for name in VALUES} == VALUES


def as_kubelet(text: str) -> str:
    """Expands as Kubernetes does: ``$$`` is ``$``, and ``$(NAME)`` a variable's value."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[0] == "$$" else f"<value of {m[1]}>", text)
