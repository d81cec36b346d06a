"""Copies of explicit partitions' class maps in a run's folder, so that its config needs no other file."""

from dataclasses import replace
from pathlib import Path

from launch.config import Job
from launch.run_folder import RunFolder
from torchrec_qr import ExplicitPartitions


def with_class_maps(job: Job, config_folder: Path, folder: RunFolder) -> Job:
    """Copies the files that ``job.tables`` name into the run's folder, and returns the job that names the copies.

    Args:
        job (Job): whose files are relative to ``config_folder``.
        config_folder (Path): of the job's YAML.
        folder (RunFolder): of the run; ``class_maps/`` in it gets the copies, each called by its SHA-256.
    """
    tables = []
    for table in job.tables:
        if isinstance(table.partitions, ExplicitPartitions) and table.partitions.file is not None:
            copy = folder.keep_file(config_folder / table.partitions.file, "class_maps")
            table = replace(table, partitions=replace(table.partitions, file=copy))
        tables.append(table)
    return replace(job, tables=tuple(tables))
