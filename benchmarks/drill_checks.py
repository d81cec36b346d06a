"""Checks of a run after a fault drill: nothing is lost, and the result is that of a run without a fault."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launch.data.errors import DataError
from launch.data.row_sums import RowSums
from launch.dcp_reader import CheckpointReader
from launch.run_checkpoints import CheckpointError, errors_of_dcp
from launch.weights import read_weights

Line = dict[str, Any]


@dataclass(frozen=True)
class Undisturbed:
    """Runs without a fault: their ranks, the metrics of the drills' seed, and the test AUC of each seed."""

    ranks: int
    seed: int
    lines: list[Line]
    auc: dict[int, float]

    @property
    def spread(self) -> tuple[float, float]:
        """The least AUC of any seed, and the greatest."""
        return min(self.auc.values()), max(self.auc.values())


def lines_of(run: Path) -> list[Line]:
    """Returns the metrics of a run, but for the speed, which no two runs share."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if key != "samples_per_s"} for line in lines]


def is_complete(lines: list[Line]) -> bool:
    """Returns whether the run has come to its end, which is its line of the test split."""
    return bool(lines) and lines[-1]["split"] == "test"


def broken_checkpoints(run: Path) -> list[str]:
    """Reads every tensor of each whole checkpoint, and each rank's file; returns what cannot be read."""
    broken = []
    for whole in sorted(run.glob("*/step_*/whole.json")):
        checkpoint = whole.parent
        try:
            ranks = json.loads(whole.read_text())["world_size"]
            for rank in range(ranks):
                torch.load(checkpoint / f"rank_{rank}.pt", weights_only=True)
            saved = CheckpointReader(checkpoint / "state").read_metadata().state_dict_metadata
            state: dict[str, Any] = {
                key: torch.empty(of.size, dtype=of.properties.dtype)
                for key, of in saved.items()
                if isinstance(of, TensorStorageMetadata)
            }
            with errors_of_dcp(f"cannot load {checkpoint}"):
                dcp.load(state, storage_reader=CheckpointReader(checkpoint / "state"), no_dist=True)
        except (OSError, ValueError, RuntimeError, CheckpointError) as error:
            broken.append(f"{checkpoint.parent.name}/{checkpoint.name}: {error}")
    return broken


def last_deals(run: Path) -> tuple[list[tuple[int, int]], bool]:
    """Returns the ranks and batches by which the epoch was trained, and whether each row was trained once."""
    whole = max(run.glob("checkpoints/step_*/whole.json"), key=lambda path: int(path.parent.name.split("_")[1]))
    saved = json.loads(whole.read_text())
    deals, each_once = saved["deals"], RowSums(**saved["trained"]) == RowSums.of_range(0, saved["order"]["rows"])
    if saved["ended"] is not None:  # else the checkpoint is that of the epoch's last step
        deals, each_once = saved["ended"]["deals"], saved["ended"]["each_row_once"]
    return [(deal["world_size"], deal["batches"]) for deal in deals], each_once


def faults_of_a_complete_run(run: Path, undisturbed: Undisturbed) -> list[str]:
    """Returns in what a run that has come to its end, after a fault, is not as it must be."""
    found = broken_checkpoints(run)
    found += [f"{path.relative_to(run)} is left" for path in run.glob("*/part_*")]
    try:
        read_weights(run / "weights")
    except DataError as error:
        found.append(str(error))
    deals, each_once = last_deals(run)
    if not each_once:
        found.append("not each row of the epoch was trained once")
    lines = lines_of(run)
    if [ranks for ranks, _ in deals] == [undisturbed.ranks]:
        differing = [a["step"] for a, b in zip(lines, undisturbed.lines, strict=False) if a != b]
        if differing or len(lines) != len(undisturbed.lines):
            found.append(f"as many ranks as before, and metrics differ, first at step {[*differing, 'end'][0]}")
    low, high = undisturbed.spread
    if not low <= lines[-1]["auc"] <= high:
        found.append(f"the AUC {lines[-1]['auc']:.4f} is not within {low:.4f} and {high:.4f}, the spread of seeds")
    return found
