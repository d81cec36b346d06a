"""The wheel of ``make wheel``: what is in it, and that it works beside each trio on a machine without a compiler."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename

import torchrec_qr
from tests.readme_example import example

ROOT = Path(__file__).parents[2]
WHEEL = ROOT / os.environ["TORCHREC_QR_TEST_WHEEL"]
TRIOS = os.environ["TORCHREC_QR_TEST_WHEEL_TRIOS"].split()
(SDIST,) = WHEEL.parent.glob("torchrec_qr-*.tar.gz")
INFO = f"torchrec_qr-{torchrec_qr.__version__}.dist-info"
LIBRARIES = ["torchrec_qr/ops/_kernels.so", "torchrec_qr/ops/_serving.so"]

pytestmark = pytest.mark.timeout(600)


def sources() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "torchrec_qr").rglob("*.py")}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_has_the_package_and_both_libraries() -> None:
    names = set(contents(WHEEL))
    of_package = {name for name in names if not name.startswith(f"{INFO}/")}
    assert of_package == {*sources(), *LIBRARIES, "torchrec_qr/py.typed"}
    assert f"{INFO}/licenses/LICENSE" in names


def test_the_tag_is_of_all_pythons_and_of_no_newer_systems_than_those_of_pytorch() -> None:
    name, version, _, tags = parse_wheel_filename(WHEEL.name)
    assert (name, str(version)) == ("torchrec-qr", torchrec_qr.__version__)
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("py3", "none")}
    oldest = [re.fullmatch(r"manylinux_2_(\d+)_x86_64", tag.platform) for tag in tags]
    assert all(match is not None and int(match[1]) <= 28 for match in oldest)
    assert "Root-Is-Purelib: false" in contents(WHEEL)[f"{INFO}/WHEEL"].decode()


def test_the_metadata_is_valid() -> None:
    metadata = Metadata.from_email(contents(WHEEL)[f"{INFO}/METADATA"], validate=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {r.name: str(r.specifier) for r in metadata.requires_dist or [] if r.marker is None}
    assert set(required) == {"numpy", "pyyaml", "torch", "torchrec"}
    assert metadata.summary == project["description"]
    assert metadata.license_expression == "BSD-3-Clause"
    assert metadata.description == (ROOT / "README.md").read_text()


def test_no_path_of_the_machine_that_built_it_is_in_it() -> None:
    places = [str(path).encode() + b"/" for path in (ROOT, Path.home(), tempfile.gettempdir())]
    for name, content in contents(WHEEL).items():
        if name in LIBRARIES or name.startswith(INFO):
            assert [place for place in places if place in content] == [], name


def test_the_sdist_has_the_sources_and_the_headers_of_both_libraries() -> None:
    with tarfile.open(SDIST) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    compiled = {path.relative_to(ROOT).as_posix() for path in (ROOT / "torchrec_qr/ops/csrc").rglob("*.*")}
    assert {"torchrec_qr/ops/csrc/forward.cpp", "torchrec_qr/ops/csrc/serving/serve.h"} <= compiled
    assert {*sources(), *compiled, "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "launch", "examples"))]


class FreshEnvironment:
    """A new virtual environment that sees the packages of a trio, and on whose PATH is nothing else."""

    def __init__(self, path: Path, trio: str) -> None:
        self.path = path
        self._trio = ROOT / (".venv" if trio == "2.13" else f".venv-{trio}")
        self._run(self._trio / "bin/python", "-m", "venv", "--without-pip", str(path))

    def install(self, wheel: Path) -> None:
        """Installs a wheel by the pip of the trio, before this environment sees the trio's packages."""
        install = ("install", "--no-deps", "--no-index", "--quiet", str(wheel))
        self._run(self._trio / "bin/python", "-m", "pip", "--python", str(self.path / "bin/python"), *install)

    def see_trio(self) -> None:
        """Adds the trio's packages behind those that are installed; editable installs among them are not followed."""
        (packages,) = self._trio.glob("lib/python*/site-packages")
        (own,) = self.path.glob("lib/python*/site-packages")
        (own / "trio.pth").write_text(f"{packages}\n")

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run(self.path / "bin" / program, *arguments)

    def _run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.path / "bin"), "HOME": str(self.path), "OMP_NUM_THREADS": "2"}
        result = subprocess.run(
            command, env=environment, cwd=self.path.parent, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result


@pytest.mark.parametrize("trio", TRIOS)
def test_the_readme_runs_from_the_wheel(trio: str, tmp_path: Path) -> None:
    environment = FreshEnvironment(tmp_path / "environment", trio)
    environment.install(WHEEL)
    environment.see_trio()
    (package,) = environment.path.glob("lib/python*/site-packages/torchrec_qr")
    program = tmp_path / "readme.py"
    program.write_text(example("+"))
    result = environment.run("python", "-P", str(Path(__file__).with_name("wheel_user.py")), str(program))
    found = json.loads(result.stdout.splitlines()[-1])

    assert found["compilers"] == []
    assert found["package"] == str(package)
    assert found["torch"].startswith(f"{trio}.")
    assert found["libraries"] == [str(package.parent / library) for library in LIBRARIES]
    assert found["lookups"] >= 1
    assert found["served_difference"] < 1e-6
    assert found["served_error"].startswith("table 't_user', feature 'user': id 1000 is outside [0, 1000)")
    assert found["warnings"] == []
    (openmp,) = found["openmp"]
    assert "/torch/lib/libgomp" in openmp or "/torch.libs/libgomp" in openmp

    says = environment.run("torchrec-qr", "doctor").stdout
    assert re.search(rf"^OK: torch {trio}\..* fit together \(tested\)\.$", says, re.MULTILINE)
    assert re.search(r"^Lookups on a CPU: kernels \((baseline|avx2|avx512)\)\.$", says, re.MULTILINE)
    assert f"\nLookups of served models: the operators of {package.parent / LIBRARIES[1]}.\n" in says


def test_without_a_compiler_the_sdist_makes_a_wheel_for_any_platform(tmp_path: Path) -> None:
    environment = FreshEnvironment(tmp_path / "environment", TRIOS[0])
    environment.see_trio()
    build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(SDIST))
    environment.run("python", "-m", "pip", *build)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"torchrec_qr-{torchrec_qr.__version__}-py3-none-any.whl"
    assert {name for name in contents(wheel) if not name.startswith(INFO)} == {*sources(), "torchrec_qr/py.typed"}
    assert "Root-Is-Purelib: true" in contents(wheel)[f"{INFO}/WHEEL"].decode()


def test_a_wheel_that_lacks_a_library_is_not_built(tmp_path: Path) -> None:
    environment = {**os.environ, "VENV": sys.prefix, "CC": "/bin/false", "CXX": "/bin/false"}
    command = (str(ROOT / "scripts/build_wheel.sh"), str(tmp_path))
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"The wheel lacks {' '.join(LIBRARIES)}: ")
    assert list(tmp_path.iterdir()) == []
