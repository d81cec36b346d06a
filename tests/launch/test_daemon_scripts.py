"""Scripts that root runs use no folder of another user, and end no process that only has the number of theirs."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SLEEP = ["sleep", "600"]


def shell(script: str) -> subprocess.CompletedProcess[str]:
    text = f'set -euo pipefail; fail() {{ echo "$*" >&2; exit 1; }}; . {SCRIPTS / "daemons.sh"}; {script}'
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def test_a_process_is_known_by_its_start(tmp_path: Path, process: "subprocess.Popen[bytes]") -> None:
    file = tmp_path / "x.pid"
    done = shell(f"note_process {process.pid} {file}; process_in {file}")
    assert done.stdout.strip() == str(process.pid)
    pid, started = file.read_text().split()
    assert int(pid) == process.pid
    assert int(started) == int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19])


def test_a_noted_process_is_ended(tmp_path: Path, process: "subprocess.Popen[bytes]") -> None:
    file = tmp_path / "x.pid"
    assert shell(f"note_process {process.pid} {file}; end_process {file} 1").returncode == 0
    assert process.wait(timeout=30) == -15
    assert not file.exists()


@pytest.mark.parametrize("noted", ["{pid} 1", "{pid}", "{pid} ", "-1 1", "0 0", "", "-{pid} {started}", "x y"])
def test_another_process_of_the_same_number_is_left_alone(
    tmp_path: Path, process: "subprocess.Popen[bytes]", noted: str
) -> None:
    file = tmp_path / "x.pid"
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()[19]
    file.write_text(noted.format(pid=process.pid, started=started) + "\n")
    assert shell(f"process_in {file}").returncode != 0
    assert shell(f"end_process {file} 1").returncode == 0
    assert process.poll() is None
    assert not file.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: the folder is to be root's")
def test_the_folder_is_roots_alone(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    assert shell(f"umask 0; own_folder {folder}").returncode == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert shell(f"own_folder {folder}").returncode == 0
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to make a folder of somebody else")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    others, link, file = tmp_path / "others", tmp_path / "link", tmp_path / "file"
    others.mkdir()
    os.chown(others, 65534, 65534)
    link.symlink_to(tmp_path)
    file.touch()
    for path in (others, link, file):
        done = shell(f"own_folder {path}; echo went on")
        assert done.returncode == 1
        assert f"{path} is not a folder that root made" in done.stderr
        assert "went on" not in done.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, as the scripts do")
@pytest.mark.parametrize(("script", "variable"), [("slurm_cluster.sh", "SLURM_CLUSTER_DIR")])
@pytest.mark.parametrize("action", ["up", "down"])
def test_the_scripts_begin_with_that(tmp_path: Path, script: str, variable: str, action: str) -> None:
    os.chown(tmp_path, 65534, 65534)
    environment = {**os.environ, variable: str(tmp_path)}
    done = subprocess.run([str(SCRIPTS / script), action], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{script}: {tmp_path} is not a folder that root made")
    assert tmp_path.is_dir()
