"""Reads a Dockerfile, and carries its steps out in a folder that takes the place of the image's root."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


def instructions(text: str) -> list[tuple[str, str]]:
    """Returns the keyword and the arguments of each instruction, continued lines joined, without comments."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    parts = [line.partition(" ") for line in "\n".join(lines).replace("\\\n", " ").splitlines()]
    return [(keyword, " ".join(rest.split())) for keyword, _, rest in parts]


@dataclass
class ImageFolder:
    """A folder for the image's root: what the image has in ``/opt`` lies in it.

    Args:
        root (Path): the folder, which is there.
        context (Path): the folder that COPY copies from.
        ignored (list[str]): names of files and folders that COPY leaves out.
        arguments (dict[str, str]): values of ARG, which take the place of the defaults.
        variables (dict[str, str]): environment variables of the commands, besides those of this process.
    """

    root: Path
    context: Path
    ignored: list[str]
    arguments: dict[str, str]
    variables: dict[str, str] = field(default_factory=dict)
    workdir: Path = Path("/")

    def carry_out(self, keyword: str, rest: str) -> None:
        """Does what an instruction does. A RUN that fails is an ``AssertionError`` with its output."""
        if keyword == "RUN":
            self.run(rest)
        elif keyword == "COPY":
            *sources, target = rest.split()
            for source in sources:
                self._copy(self.context / source, self.workdir / target)
        elif keyword == "WORKDIR":
            self.workdir = Path(self._inside(rest))
            self.workdir.mkdir(parents=True)
        elif keyword in ("ARG", "ENV"):
            for name, value in (pair.split("=", 1) for pair in rest.split()):
                given = self.arguments if keyword == "ARG" else {}
                self.variables[name] = given.get(name, self._filled(value))
        else:
            raise ValueError(f"{keyword} {rest}: a step that is not known here")

    def run(self, command: str) -> str:
        """Runs a command in the folder, and returns what it prints."""
        environment = {**os.environ, **self.variables}
        done = subprocess.run(
            ["sh", "-e", "-c", self._inside(command)],
            cwd=self.workdir,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _inside(self, text: str) -> str:
        return re.sub(r"(?<![\w/])/opt\b", f"{self.root}/opt", text)

    def _filled(self, value: str) -> str:
        values = {**os.environ, **self.variables}
        return re.sub(r"\$(\w+)", lambda match: values[match[1]], self._inside(value))

    def _copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*self.ignored))
        else:
            target.mkdir(exist_ok=True)
            shutil.copy2(source, target)
