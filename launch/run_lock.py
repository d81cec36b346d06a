"""The lock of a run's folder: one job at a time writes there, on whichever host of a shared file system it runs."""

import contextlib
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

PERIOD_S = 5.0
SILENT_PERIODS = 12
_NAME = re.compile(r"lock\.([1-9][0-9]*)")
# A launcher's name of a job, which stays when it starts the job again. Plain torchrun has the name "none".
_JOB_VARIABLES = (("TORCHX_JOB_ID",), ("SLURM_JOB_ID", "SLURM_STEP_ID"), ("TORCHELASTIC_RUN_ID",))


class RunFolderError(RuntimeError):
    """The folder of a run cannot be used."""


class RunInUseError(RunFolderError):
    """Another job has the folder of a run."""


@dataclass(frozen=True)
class Holder:
    """The process that has a lock.

    Attributes:
        host (str): its name, for a person.
        boot (str): identifies what the pid counts in: the host since it started, and the namespace of its processes.
        pid (int): of the process.
        started (int): when the process started, in the kernel's ticks since the host did; a pid is used again.
        job (str): the launcher's name of the job; "" if it has none.
        released (bool): whether the process has given the lock back.
    """

    host: str
    boot: str
    pid: int
    started: int
    job: str
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")

    @property
    def is_here(self) -> bool:
        """Returns whether this process can see that one."""
        return self.boot == _boot()

    @property
    def is_alive(self) -> bool:
        """Returns whether the process, which must be here, runs."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        started = _started(self.pid)
        return started is None or started == self.started

    @classmethod
    def of_this_process(cls) -> "Holder":
        pid = os.getpid()
        return cls(socket.gethostname(), _boot(), pid, _started(pid) or 0, job_name(os.environ))


class RunLock:
    """Holds ``<root>/lock.<n>``, of which the highest n counts, from construction to `release`.

    The file names its `Holder`, and a thread writes it anew every period, so that its time of modification is a lease.
    No process removes or renames the highest n. A process that takes a free lock makes n + 1, which only one can.
    Advisory locks would not do, as they do not reach other hosts on many shared file systems.

    A lock is free if its holder has released it, has died on this host, or has been silent for 12 periods. It is also
    free if the launcher has started the holder's job again on another host. Ages compare times of the file system
    alone.

    Args:
        root (Path): the run's folder, which is made if it is not there.
        period_s (float): of renewals.

    Raises:
        RunInUseError: names the holder, and the age of its lease.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, root: Path, period_s: float = PERIOD_S) -> None:
        self._root, self._period_s = root, period_s
        self._own = Holder.of_this_process()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost = ""
        self._number = self._file = -1
        self._take()

    def keep(self) -> None:
        """Renews the lease from now on."""
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._thread.start()

    def move_folder(self, to: Path) -> None:
        """Renames the folder to ``to`` and locks a new one in its place; must come before `keep`."""
        self.require()
        self._root.rename(to)
        self._free()
        self._take()

    @property
    def lost(self) -> bool:
        """True if the lock was another's, or gone, at the last look, which every renewal takes."""
        return bool(self._lost)

    def is_held(self) -> bool:
        """Looks whether the lock is still held."""
        with contextlib.suppress(OSError):  # the lock may be held though the file system does not answer
            self._look()
        return not self._lost

    def require(self) -> None:
        """Looks whether the lock is still held.

        Raises:
            RunInUseError: another job has taken it, or it was removed.
        """
        if not self.is_held():
            raise RunInUseError(self._lost)

    def release(self) -> None:
        """Ends the renewals, and leaves a lock that is free."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._free()

    def _free(self) -> None:
        with contextlib.suppress(OSError):  # then the lease ends by this process's death, or by silence
            self._write(released=True)
        self._close()

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _renew(self) -> None:
        while not self._ended.wait(self._period_s):
            with contextlib.suppress(OSError):  # the next period tries again
                self._look()
                self._write()

    def _look(self) -> None:
        try:
            numbers = _numbers(self._root)
        except FileNotFoundError:
            numbers = []
        if numbers and numbers[-1] > self._number:
            holder = None
            with contextlib.suppress(OSError):
                holder = _parsed((self._root / f"lock.{numbers[-1]}").read_text())
            self._lost = f"{self._root} is in use by another job, which took it over: {holder or 'not known yet'}"
        elif self._number not in numbers:
            self._lost = f"{self._root}: its lock.{self._number} was removed while this job was using it"

    def _write(self, released: bool = False) -> None:
        holder = Holder(**{**asdict(self._own), "released": released})
        # Keep one length and write in place, so that a reader finds it whole.
        text, written = json.dumps(asdict(holder)).ljust(1024).encode(), 0
        while written < len(text):  # a disk that fills up takes a part, and raises at the rest
            written += os.pwrite(self._file, text[written:], written)
        os.fsync(self._file)

    def _take(self) -> None:
        taken = False
        while not taken:
            self._root.mkdir(parents=True, exist_ok=True)
            # Use the descriptor: the folder may be moved aside meanwhile, and another come in its place.
            folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                taken = self._take_in(folder)
            finally:
                os.close(folder)

    def _take_in(self, folder: int) -> bool:
        """Takes the lock, or returns False if another job was quicker."""
        last = next(reversed(_numbers(folder)), 0)
        if last and not self._is_free(folder, f"lock.{last}"):
            return False
        self._number, name = last + 1, f"lock.{last + 1}"
        try:
            self._file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644, dir_fd=folder)
        except FileExistsError:
            return False
        try:
            self._write()
        except OSError:
            self._drop(folder, name)
            raise
        # A later one is there if others have taken, released and removed this number meanwhile.
        if not self._is_root(folder) or _numbers(folder)[-1] != self._number:
            self._drop(folder, name)
            return False
        for number in _numbers(folder)[:-1]:
            with contextlib.suppress(OSError):
                os.unlink(f"lock.{number}", dir_fd=folder)
        return True

    def _is_root(self, folder: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._root), os.fstat(folder))
        except FileNotFoundError:
            return False

    def _drop(self, folder: int, name: str) -> None:
        self._close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)

    def _is_free(self, folder: int, name: str) -> bool:
        """Returns whether the lock may be taken, or False if it is no longer there.

        Raises:
            RunInUseError: it is held.
        """
        try:
            file = os.open(name, os.O_RDONLY, dir_fd=folder)
        except FileNotFoundError:
            return False
        with os.fdopen(file) as f, tempfile.TemporaryFile(dir=f"/proc/self/fd/{folder}") as now:
            holder = _parsed(f.read())
            age_s = os.fstat(now.fileno()).st_mtime - os.fstat(f.fileno()).st_mtime
        silent_s = SILENT_PERIODS * self._period_s
        if age_s >= silent_s or (holder is not None and self._has_ended(holder)):
            return True
        raise RunInUseError(
            f"{self._root} is in use by {holder or 'a job that is starting'}, which renewed its lock "
            f"{max(age_s, 0):.0f} s ago; allowed: another --name, or to wait until that job has ended or is silent for "
            f"{silent_s:.0f} s"
        )

    def _has_ended(self, holder: Holder) -> bool:
        if holder.released or (holder.is_here and not holder.is_alive):
            return True
        # The launcher started the job again elsewhere, which it does only if it believes the first one dead.
        return not holder.is_here and holder.job != "" and holder.job == self._own.job


def job_name(environment: Mapping[str, str]) -> str:
    """Returns the launcher's name of the job, which its restarts share, or "" if it has none.

    Example:
        >>> job_name({"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "TORCHELASTIC_RUN_ID": "none"})
        '17.0'
        >>> job_name({"TORCHELASTIC_RUN_ID": "none"})
        ''
    """
    names = (".".join(environment.get(v, "") for v in variables) for variables in _JOB_VARIABLES)
    return next((name for name in names if name.strip(".") not in ("", "none")), "")


def _numbers(folder: Path | int) -> list[int]:
    return sorted(int(match[1]) for name in os.listdir(folder) if (match := _NAME.fullmatch(name)))


def _parsed(text: str) -> Holder | None:
    """Returns None for a file that its holder has made and not written yet."""
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _boot() -> str:
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int | None:
    """Returns when the process started, -1 if it has ended and waits for its parent, None if that cannot be seen."""
    try:
        # The name, which may have spaces and parentheses, ends at the last parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])
