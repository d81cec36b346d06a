"""The folder in which Triton keeps compiled kernels: one of the node if the job names it, else Triton's own."""

import os
import socket
import stat
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from string import Template


class CacheError(RuntimeError):
    """Triton's cache cannot be used."""


def use_node_cache(folder: str | None, environment: MutableMapping[str, str]) -> Path | None:
    """Makes Triton keep its kernels in ``folder``/<host>, and returns that; None: the job names no folder.

    Triton's own folder, ``~/.triton/cache``, stays the default: it outlives the job, so that the next one does not
    compile. If many nodes write a home at once, or no job may, use a folder of the node. The host's name
    is part of the path, so that a folder which nodes share will do. Must be called before the first launch.

    Args:
        folder (str | None): ``train.triton_cache``; ``~`` and variables are replaced.
        environment (MutableMapping[str, str]): of this process, in which TRITON_CACHE_DIR is set.

    Raises:
        CacheError: a variable that is not set; a folder that cannot be made or written, or that others can write,
            since its files are loaded as code.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     environment = {"SLURM_TMPDIR": root}
        ...     path = use_node_cache("$SLURM_TMPDIR/triton", environment)
        ...     path == Path(root) / "triton" / socket.gethostname(), environment["TRITON_CACHE_DIR"] == str(path)
        (True, True)
    """
    if folder is None:
        return None
    path = Path(_replaced(folder, environment)) / socket.gethostname()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"train.triton_cache: {folder!r}: cannot make {path}: {error.strerror}") from None
    if (unsafe := next((at for at in (path, *path.parents) if _is_of_others(at)), None)) is not None:
        raise CacheError(
            f"train.triton_cache: {folder!r}: {unsafe} belongs to another user or can be written by others, and what "
            "lies there is loaded as code. Allowed: a folder of your own (mode 700), or one that is not there yet"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise CacheError(f"train.triton_cache: {folder!r}: {path} cannot be written. Allowed: a folder that can")
    environment["TRITON_CACHE_DIR"] = str(path)
    return path


@contextmanager
def cache_named() -> Iterator[None]:
    """Adds to an error of the file system, while kernels are compiled, the folder and the way to choose another.

    Raises:
        CacheError: names the folder and the key.
    """
    try:
        yield
    except OSError as error:
        where = os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")
        raise CacheError(
            f"Triton cannot compile into its cache {where}: {error}. Allowed: a folder of each node that can be "
            "written, as --set train.triton_cache=/tmp/$USER/triton"
        ) from error


def _is_of_others(path: Path) -> bool:
    """Returns whether another user than root may replace what lies in a folder."""
    status = path.stat()
    shared = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
    return status.st_uid not in (0, os.getuid()) or bool(shared)


def _replaced(folder: str, environment: MutableMapping[str, str]) -> str:
    try:
        # An unset HOME is an unset variable.
        return Template(folder.replace("~/", "$HOME/", 1) if folder.startswith("~/") else folder).substitute(
            environment
        )
    except (KeyError, ValueError) as error:
        raise CacheError(f"train.triton_cache: {folder!r}: not set on {socket.gethostname()}: {error}") from None
