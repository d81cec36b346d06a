"""The job of one rank: ``python -m launch.train --config FILE``, under torchrun, TorchX, Slurm, Ray, or alone."""

import argparse
import os
import random
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torchrec import EmbeddingBagConfig

from launch.config import Job, read_job, write_job
from launch.console import Output
from launch.data.loader import Data
from launch.data.meaning import Meaning
from launch.data.split import Splits, open_splits
from launch.job_tables import freeze, job_tables
from launch.kept_files import with_kept_files
from launch.kept_meaning import agreed_meaning
from launch.metrics import Quality
from launch.model import build_model
from launch.parallel import parallelize
from launch.process_group import start_process_group
from launch.profile import profiled
from launch.quiet_stack import silence_the_stack
from launch.run_folder import RunFolder, opened_by_all
from launch.run_name import is_run_name
from launch.task import TrainTask
from launch.trainer import Trainer
from launch.triton_cache import cache_named, use_node_cache
from launch.waits import Waits
from torchrec_qr.cli.schema import ConfigError
from torchrec_qr.distributed.warm_up import warm_up


def main(argv: list[str] | None = None) -> None:
    """Trains the job of a config, or continues it from its last checkpoint; writes runs/<name>/."""
    arguments = _parser().parse_args(argv)
    try:
        _start(arguments)
    except KeyboardInterrupt:  # before the steps, which end with a checkpoint
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if arguments.traceback:
            traceback.print_exc()
        print(_line(error, arguments.traceback), file=sys.stderr, flush=True)
        sys.exit(1)


@record  # writes torchelastic's error file, and raises on
def _start(arguments: argparse.Namespace) -> None:
    silence_the_stack()
    job = read_job(arguments.config, arguments.set)
    use_node_cache(job.train.triton_cache, os.environ)
    device = start_process_group(job.train)
    waits = Waits(job.train, device)
    rank = dist.get_rank()
    random.seed(job.train.seed + rank)
    torch.manual_seed(job.train.seed + rank)
    root = Path(arguments.runs) / (arguments.name or job.train.name)
    if job.train.init_from is not None and _same(job.train.init_from, root):
        raise ConfigError("train.init_from", job.train.init_from, f"the folder of another run than {root}, this one")
    with waits.patient():  # at its end the folder is there
        # Look at the data first, because a run that has ended is moved aside when the folder is opened.
        splits = open_splits(job.data, job.rows_of_features())
        folder = opened_by_all(root, rank, waits.group)
    try:
        _run(job, splits, arguments, folder, Output(rank, arguments.quiet), device, waits)
    finally:
        folder.close()
    dist.destroy_process_group()


def _run(
    job: Job,
    splits: Splits,
    arguments: argparse.Namespace,
    folder: RunFolder,
    output: Output,
    device: torch.device,
    waits: Waits,
) -> None:
    if folder.moved is not None:
        output.say(f"{folder.root} was a run that had ended; it is now {folder.moved}")
    config_folder = Path(arguments.config).parent
    with waits.patient():
        tables = job_tables(job, config_folder)
        meaning = agreed_meaning(job, folder, waits, lambda: Meaning.of_job(job, splits.train))
        pinned = device.type == "cuda"
        data = Data(job, splits, meaning, dist.get_rank(), dist.get_world_size(), pinned)
    for name in data.splits.empty_files():
        output.note(f"{name} has no rows and is left out")
    for feature, number in data.meaning.without_rows().items():
        output.note(f"{feature}: its table has too few rows; the {number:,} rarest values share row 0")
    output.note(
        f"{job.train.name}: {len(tables)} tables, {data.batches_per_epoch:,} steps an epoch of "
        f"{dist.get_world_size()} × {job.train.batch_size:,} rows on {device.type}"
    )
    model = build_model(job.model, tables, device)
    freeze(model, job.train.frozen)
    kept = with_kept_files(job, config_folder, folder)
    if job.planner.plan_file is not None:
        job = replace(job, planner=replace(job.planner, plan_file=str(config_folder / job.planner.plan_file)))
    trainer, test = trained(job, tables, model, data, folder, output, device, waits, arguments.profile, kept)
    speed = trainer.speed
    output.summary(
        [
            ("test AUC", f"{test.auc:.4f}"),
            *((name.replace("_", " ").replace("auc", "AUC"), f"{v:.4f}") for name, v in data.known_quality().items()),
            ("normalized entropy", f"{test.ne:.4f}"),
            ("logloss", f"{test.logloss:.4f}"),
            (
                "speed",
                f"{speed.samples_per_s:,.0f} samples/s, {speed.waited_share:.1%} of the time waiting for data",
            ),
            *_skipped(trainer.skipped.of_split),
            ("run", str(folder.root)),
        ]
    )


def trained(
    job: Job,
    tables: list[EmbeddingBagConfig],
    model: nn.Module,
    data: Data,
    folder: RunFolder,
    output: Output,
    device: torch.device,
    waits: Waits,
    profile: bool = False,
    kept: Job | None = None,
) -> tuple[Trainer, Quality]:
    """Trains ``model``, on tables ``tables``, to the end; returns the trainer and the quality on the test split.

    All ranks must call it, in a process group, with the random seed set. ``kept`` is the job as ``config.yaml`` is to
    have it; default: ``job``.
    """
    torch.set_float32_matmul_precision("high" if job.train.tf32 else "highest")
    task = TrainTask(model, device, torch.bfloat16 if job.train.bf16 else None)
    with waits.patient():
        parallel = parallelize(task, job, device)
        with cache_named():
            warm_up(parallel.model)
    plan = output.tables(tables, parallel.shardings)
    with profiled(folder.root, profile) as profiler:
        trainer = Trainer(job, task, parallel, data, folder, output, waits, profiler)
        checkpoint = trainer.resume()
        if checkpoint is not None:
            output.say(f"continues at step {trainer.step}, from {checkpoint}")
        elif job.train.init_from is not None:
            best = trainer.saved_model.start_from(Path(job.train.init_from).expanduser())
            output.say(f"starts from the weights of {best}")
        # Write these only now, because a job that is refused must leave the run as it is.
        folder.write_text("config.yaml", write_job(kept or job))
        folder.write_text("plan.txt", plan)
        test = trainer.train()
    numbers = {"logloss": test.logloss, "ne": test.ne, "calibration": test.calibration}
    known, speed = data.known_quality(), trainer.speed.samples_per_s
    of_split = trainer.skipped.of_split
    skipped = {"skipped_rows": of_split["test"]} if of_split else {}
    folder.log(trainer.step, "test", auc=test.auc, **known, **numbers, **skipped, samples_per_s=speed)
    return trainer, test


def _skipped(of_split: dict[str, int]) -> list[tuple[str, str]]:
    if not any(of_split.values()):
        return []
    return [("malformed rows left out", ", ".join(f"{name} {n:,}" for name, n in of_split.items()))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch.train", description=main.__doc__)
    parser.add_argument("--config", required=True, help="the job's YAML")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key: --set model.embedding_dim=32"
    )
    parser.add_argument("--name", type=_run_name, help="the run's folder in --runs; default: train.name of the config")
    parser.add_argument(
        "--runs",
        type=_folder,
        default="runs",
        help="the folder of run folders, which all nodes see (default: %(default)s)",
    )
    parser.add_argument("--profile", action="store_true", help="write a Chrome trace of some steps, one file per rank")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came up")
    parser.add_argument("--quiet", action="store_true", help="print validations and the summary alone")
    return parser


def _line(error: Exception, shown: bool) -> str:
    """Returns type and message, and for an error that is none of this project's how to see more."""
    own = type(error).__module__.split(".")[0] in ("launch", "torchrec_qr")
    more = "" if own or shown else " (--traceback shows where)"
    return f"{type(error).__name__}: {error}{more}"


def _same(run: str, root: Path) -> bool:
    return Path(run).expanduser().resolve() == root.resolve()


def _run_name(text: str) -> str:
    if not is_run_name(text):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: the name of a folder in --runs, without / and not hidden")
    return text


def _folder(text: str) -> str:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is a URL; allowed: a folder that all nodes see. A program of your own writes checkpoints to URLs, "
            "by torchrec_qr.distributed.async_checkpoint"
        )
    return text


if __name__ == "__main__":
    main()
