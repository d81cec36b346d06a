"""Triton's cache lies in the job's folder for it, with a folder for each node that no other user can write."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.triton_cache import CacheError, cache_named, use_node_cache
from tests.launch.jobs import SMALL, run, with_set


def test_the_default_is_left_alone() -> None:
    environment = {"HOME": "/home/me"}
    assert use_node_cache(None, environment) is None
    assert environment == {"HOME": "/home/me"}


@pytest.mark.parametrize("folder", ["~/cache", "$HOME/cache", "${HOME}/cache"])
def test_each_node_has_a_folder_of_its_own(folder: str, tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "TRITON_CACHE_DIR": "/elsewhere"}
    path = tmp_path / "cache" / socket.gethostname()
    assert use_node_cache(folder, environment) == path
    assert environment["TRITON_CACHE_DIR"] == str(path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert use_node_cache(folder, environment) == path  # the next rank of the node


def test_triton_takes_it(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code = (
        "import os, sys\nfrom launch.triton_cache import use_node_cache\nimport triton\n"
        "path = use_node_cache(sys.argv[1], os.environ)\nassert triton.knobs.cache.dir == str(path)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("folder", ["$NO_SUCH_VARIABLE/triton", "${NO_SUCH_VARIABLE}", "~/triton", "/tmp/$"])
def test_a_variable_that_is_not_set(folder: str) -> None:
    with pytest.raises(CacheError, match=rf"^train\.triton_cache: '.*: not set on {socket.gethostname()}: "):
        use_node_cache(folder, {})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot make .*Not a directory"):
        use_node_cache(f"{tmp_path}/file", {})


@pytest.mark.parametrize("which", ["cache", f"cache/{socket.gethostname()}"])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, which: str) -> None:
    path = tmp_path / which
    path.mkdir(parents=True)
    path.chmod(0o777)
    with pytest.raises(CacheError, match=rf": {path} belongs to another user or can be written by others, and what"):
        use_node_cache(f"{tmp_path}/cache", {})


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/file/cache")
    with pytest.raises(CacheError) as caught, cache_named():
        os.makedirs(os.environ["TRITON_CACHE_DIR"])
    assert f"cannot compile into its cache {tmp_path}/file/cache: " in str(caught.value)
    assert "--set train.triton_cache=" in str(caught.value)


def test_a_job_makes_the_folder(tmp_path: Path) -> None:
    run(tmp_path, *with_set(*SMALL, "train.max_steps=1", f"train.triton_cache={tmp_path}/cache"), world_size=1)
    assert (tmp_path / "cache" / socket.gethostname()).is_dir()
