"""One meaning of stored rows on all ranks: rank 0 sees to it, and the others read it from the run's folder."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from launch.config import Job
from launch.data.errors import DataError
from launch.data.meaning import Meaning, MeaningError, settled
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
        job: of the run.
        folder: of the run.
        waits: of the job.
        build: makes the meaning of new rows; called on rank 0 alone, since it may read all rows.

    Raises:
        MeaningError: on every rank; the job would change what is kept.
        DataError: on every rank; what is kept, or the job's data, cannot be read.
        RunFolderError: on every rank; the map cannot be written.
    """
    outcome: list[str | Exception] = [""]
    if dist.get_rank() == 0:
        try:
            with writing_errors_named(folder.root / "meaning.json"):
                outcome = [settled(job, folder.root, _kept(job, folder, waits), build).hash]
        except (MeaningError, DataError, ConfigError, RunFolderError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, group=waits.group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    meaning = Meaning.read(folder.root)
    if meaning.hash != outcome[0]:
        raise MeaningError(
            f"{folder.root}: this rank reads a map with SHA-256 {meaning.hash}, and rank 0 wrote {outcome[0]}; "
            "allowed: one folder that all nodes see (--runs)"
        )
    return meaning


def _kept(job: Job, folder: RunFolder, waits: Waits) -> Path | None:
    if Checkpoints(folder.checkpoints, 1, waits).latest() is not None:
        return folder.root
    return None if job.train.init_from is None else Path(job.train.init_from).expanduser()
