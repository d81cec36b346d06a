"""Environment variables of a job, from ``--env`` to the rank, as they are written."""

import re
import shlex
from typing import Any

from torchx.specs.finder import ComponentValidationException

# A comma ends a variable if the next one begins behind it, unless a backslash stands before the comma.
_ENDS = re.compile(r"(?<!\\),(?=[A-Za-z_][A-Za-z0-9_]*=)")
_BEHIND_SPACES = re.compile(r"(?<!\\),\s+[A-Za-z_][A-Za-z0-9_]*=")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VALUE_OF_SRUN = re.compile(r"[A-Za-z0-9_@%+=:./-]*")


def parsed_variables(text: str) -> dict[str, str]:
    """Returns the variables of ``--env``. TorchX's own parser drops the beginning of some values, and splits others."""
    variables: dict[str, str] = {}
    for pair in _ENDS.split(text) if text else []:
        name, equals, value = pair.partition("=")
        if not equals or _NAME.fullmatch(name) is None:
            raise ComponentValidationException(
                f"--env {text}: {pair!r}; allowed: NAME=VALUE,NAME=VALUE, names of letters, digits and _"
            )
        if name in variables:
            raise ComponentValidationException(f"--env {text}: {name} is given twice; allowed: once")
        if _BEHIND_SPACES.search(value):
            raise ComponentValidationException(
                f"--env {name}: {value!r} has what looks like another variable, behind a space; allowed: none, or a "
                "backslash before a comma that is part of the value"
            )
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ComponentValidationException(f"--env {name}: {value!r} is not UTF-8; allowed: text")
        variables[name] = value.replace("\\,", ",")
    return variables


def export_in_shell(variables: dict[str, str], request: Any) -> None:
    """Makes the job's shell set values that srun's ``--export`` would split at commas, or strip of quotes."""
    hard = {name: value for name, value in variables.items() if _VALUE_OF_SRUN.fullmatch(value) is None}
    for replica in request.replicas.values():
        # TorchX puts the job's id where it finds its macro, which in a value is text.
        quoted = {name: shlex.quote(value).replace("${app_id}", "${app''_id}") for name, value in hard.items()}
        exports = "".join(f"export {name}={value}; " for name, value in quoted.items())
        replica.env = {name: value for name, value in replica.env.items() if name not in hard}
        replica.args[1] = exports + replica.args[1]


def escape_references(variables: dict[str, str], request: Any) -> None:
    """Escapes values, because Kubernetes fills in ``$(NAME)`` in them, and reads ``$$`` as ``$``."""
    for task in request.resource["spec"]["tasks"]:
        for container in task["template"].spec.containers:
            for variable in container.env:
                if variable.name in variables:
                    variable.value = variable.value.replace("$", "$$")
