"""One meaning of stored rows on all ranks: rank 0 sees to it, and the others read it from the run's folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from launch.config import Job
from launch.data.errors import DataError
from launch.data.meaning import Meaning, MeaningError
from launch.process_group import from_rank_0
from launch.run_checkpoints import Checkpoints
from launch.run_folder import RunFolder, writing_errors_named
from launch.run_lock import RunFolderError
from launch.waits import Waits
from torchrec_qr.cli.schema import ConfigError


def agreed_meaning(job: Job, folder: RunFolder, waits: Waits, build: Callable[[], Meaning]) -> Meaning:
    """Returns the meaning of the run's rows; all ranks must call it, in a patient section.

    A run that has a checkpoint keeps what lies in its folder. A new one that starts from another's weights keeps the
    other's, and any other new one makes its own.

    Args:
        job (Job): of the run.
        folder (RunFolder): of the run.
        waits (Waits): of the job.
        build (Callable[[], Meaning]): makes the meaning of new rows; called on rank 0 alone, since it may read all
            rows.

    Raises:
        MeaningError: on every rank; the job would change what is kept.
        DataError: on every rank; what is kept, or the job's data, cannot be read.
        RunFolderError: on every rank; the map cannot be written.
    """
    settle = partial(_settled, job, folder, waits, build)
    of_rank_0 = from_rank_0(settle, waits.group, MeaningError, DataError, ConfigError, RunFolderError, OSError)
    meaning = Meaning.read(folder.root)
    if meaning.hash != of_rank_0:
        raise MeaningError(
            f"{folder.root}: this rank reads a map with SHA-256 {meaning.hash}, and rank 0 wrote {of_rank_0}; "
            "allowed: one folder that all nodes see (--runs)"
        )
    return meaning


def _settled(job: Job, folder: RunFolder, waits: Waits, build: Callable[[], Meaning]) -> str:
    """Returns the hash of the meaning of the run's rows, and sees that the run's folder has that meaning."""
    kept = None if job.train.init_from is None else Path(job.train.init_from).expanduser()
    if Checkpoints(folder.checkpoints, 1, waits).latest() is not None:
        kept = folder.root
    if kept is None:
        meaning = build()
    else:
        meaning = Meaning.read(kept)
        meaning.check(job, kept)
    if kept != folder.root:
        with writing_errors_named(folder.root / "meaning.json"):
            meaning.write(folder.root)
    return meaning.hash
