"""Copies of the files that a config names in a run's folder, so that its config needs no other file."""

from dataclasses import replace
from pathlib import Path

from launch.config import Job
from launch.run_folder import RunFolder
from torchrec_qr import ExplicitPartitions
from torchrec_qr.cli.schema import ConfigError


def with_kept_files(job: Job, config_folder: Path, folder: RunFolder) -> Job:
    """Copies class maps and the plan that a job names into the run's folder, and returns the job that names the copies.

    Args:
        job (Job): whose files are relative to ``config_folder``.
        config_folder (Path): of the job's YAML.
        folder (RunFolder): of the run; ``class_maps/`` and ``plans/`` in it get the copies, each called by its SHA-256.

    Raises:
        ConfigError: the plan cannot be read.
    """
    tables = []
    for table in job.tables:
        if isinstance(table.partitions, ExplicitPartitions) and table.partitions.file is not None:
            copy = folder.keep_file(config_folder / table.partitions.file, "class_maps")
            table = replace(table, partitions=replace(table.partitions, file=copy))
        tables.append(table)
    planner = job.planner
    if planner.plan_file is not None:
        try:
            planner = replace(planner, plan_file=folder.keep_file(config_folder / planner.plan_file, "plans"))
        except OSError as error:
            allowed = "a file that `torchrec-qr plan --json` wrote"
            problem = f"{planner.plan_file!r} cannot be read: {error.strerror}; allowed: {allowed}"
            raise ConfigError("planner.plan_file", planner.plan_file, allowed, problem) from error
    return replace(job, tables=tuple(tables), planner=planner)
