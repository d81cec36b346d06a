"""Scores rows by a run that came to its end.

``python -m launch.predict --run runs/x --data FILES --out scores.parquet``

It needs the run's folder alone, with ``config.yaml``, the map from values to rows, and the weights. It runs in one
process, on a GPU if there is one. Row i of the output is row i of the input, file after file: ``logit`` and ``score``,
its probability; both are null for a malformed row, under ``--on-bad-row skip``. If rows have labels, it prints AUC
and log loss.

``--dtype int8`` and ``int4`` score by rows of embeddings that are quantised when the model is read, on a CPU.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from launch.config import read_job
from launch.data.batch import Batch
from launch.data.errors import BadRows, DataError, OnBadRow, readable
from launch.data.loader import Data
from launch.data.meaning import Meaning, MeaningError
from launch.data.split import Split, Splits, opened_files
from launch.job_tables import job_tables
from launch.metrics import Quality, quality
from launch.model import build_model
from launch.quiet_stack import silence_the_stack
from launch.task import TrainTask
from launch.weights import read_weights
from torchrec_qr import raise_pending
from torchrec_qr.cli.schema import ConfigError
from torchrec_qr.inference import quantize_embeddings

Dtype = Literal["fp32", "int8", "int4"]

_QUANTISED: dict[Dtype, torch.dtype] = {"int8": torch.qint8, "int4": torch.quint4x2}
_SCHEMA = pa.schema([("logit", pa.float32()), ("score", pa.float32())])


class Run:
    """The model and the meaning of a run that came to its end, read from its folder.

    Args:
        folder (Path): ``runs/<name>``.
        device (torch.device): of the model.
        dtype (Dtype): of the rows of embeddings; ``fp32``: as they were trained.

    Attributes:
        model (nn.Module): (dense, ids) → logits (B, 1).

    Raises:
        DataError: the folder lacks weights or the map, or a file of it is corrupt.
        MeaningError: config, map and weights do not belong together.
        ConfigError: the config cannot be used.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: Dtype = "fp32") -> None:
        with readable(folder / "config.yaml"):
            self.job = read_job(folder / "config.yaml")
        self.meaning = Meaning.read(folder)
        self.meaning.check_config(self.job, folder)
        tensors, about = read_weights(folder / "weights")
        if about.get("meaning") != self.meaning.hash:
            raise MeaningError(
                f"{folder / 'weights'}: trained with the map {about.get('meaning')} (SHA-256), and the folder's is "
                f"{self.meaning.hash}; allowed: the files of one run"
            )
        self._device = device
        model = build_model(self.job.model, job_tables(self.job, folder), device, embeddings_on=device)
        try:
            model.load_state_dict(tensors)
        except (RuntimeError, ValueError) as error:
            raise DataError(str(folder / "weights"), f"of another model than config.yaml: {error}") from error
        if dtype in _QUANTISED:
            model = quantize_embeddings(model, _QUANTISED[dtype], inplace=True)
        # Use the precision of training, because logits must be those of its evaluation.
        self.model = model
        self._task = TrainTask(model, device, torch.bfloat16 if self.job.train.bf16 else None).eval()
        torch.set_float32_matmul_precision("high" if self.job.train.tf32 else "highest")

    def opened(self, files: Sequence[str], on_bad_row: OnBadRow | None = None) -> Data:
        """Opens the rows of ``files`` as the test split of data that are mapped as in training."""
        section = self.job.data
        if section.format == "generator":
            raise ConfigError("data.format", "generator", "a run that was trained on files")
        section = replace(section, files=tuple(files), train_files=(), validation_files=(), test_files=())
        section = replace(section, on_bad_row=on_bad_row or section.on_bad_row)
        source = opened_files(section, files, optional_labels=True)
        rows = Split("test", source, 0, source.num_rows)
        pinned = self._device.type == "cuda"
        return Data(replace(self.job, data=section), Splits(rows, rows, rows), self.meaning, pinned=pinned)

    @torch.no_grad()
    def scored(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns logits, labels (NaN if there is none) and weights (0 of a malformed row, and of padding)."""
        _, predicted = self._task(batch.to(self._device, non_blocking=True))
        raise_pending()
        return tuple(tensor.float().cpu() for tensor in predicted)


@dataclass(frozen=True)
class Scored:
    """The outcome of scoring: rows, malformed ones among them, quality on labelled ones, and files without rows."""

    rows: int
    bad_rows: BadRows
    quality: Quality
    empty_files: list[str]


def predict(
    run: Path,
    files: Sequence[str],
    out: Path,
    on_bad_row: OnBadRow | None = None,
    device: str | None = None,
    dtype: Dtype = "fp32",
) -> Scored:
    """Scores the rows of ``files`` and writes them to ``out``, which appears when it is complete.

    Args:
        run (Path): the folder of a run that came to its end.
        files (Sequence[str]): of the run's ``data.format``: paths, or patterns; with labels or without.
        out (Path): a Parquet file.
        on_bad_row (OnBadRow | None): what a malformed row does; default: as in the run's config.
        device (str | None): default: the GPU, or the CPU if there is none or ``dtype`` quantises.
        dtype (Dtype): of the rows of embeddings; ``fp32``: as they were trained. ``int8`` and ``int4`` are for a CPU.

    Raises:
        ValueError: ``dtype`` quantises, and ``device`` is no CPU.
        DataError: a file of the run, or of the rows, cannot be used; ``out`` is a folder, or no name of a
            Parquet file; a malformed row, with file and line.
        MeaningError: the files of the run do not belong together.
        ConfigError: the run was trained on no files.
    """
    if out.is_dir():
        raise DataError(str(out), "a folder; allowed: the name of a file to write")
    if out.suffix != ".parquet":
        raise DataError(str(out), "scores are written as Parquet; allowed: a name that ends in .parquet")
    if dtype in _QUANTISED and device not in (None, "cpu"):
        raise ValueError(f"--dtype {dtype}: --device is {device}; allowed: cpu, for which quantised rows have a kernel")
    chosen = device or ("cuda" if torch.cuda.is_available() and dtype not in _QUANTISED else "cpu")
    opened = Run(run, torch.device(chosen), dtype)
    data = opened.opened(files, on_bad_row)
    num_rows = left = len(data.splits.test)
    logits, labels = [torch.empty(0)], [torch.empty(0)]  # of all labelled rows, as AUC needs them
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    batches = data.test()
    try:
        with pq.ParquetWriter(part, _SCHEMA) as writer, batches:
            for batch in batches:
                x, y, weights = (tensor[:left] for tensor in opened.scored(batch))
                left -= len(x)
                malformed = weights.numpy() == 0
                columns = [pa.array(c.numpy(), pa.float32(), mask=malformed) for c in (x, x.double().sigmoid().float())]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
                counts = (weights > 0) & ~y.isnan()
                logits.append(x[counts])
                labels.append(y[counts])
        batches.bad_rows.require_good(num_rows - batches.bad_rows.count, str(files[0]))
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)  # of a run that failed; a whole one has been renamed
    scored = quality(torch.cat(logits), torch.cat(labels))
    return Scored(num_rows, batches.bad_rows, scored, data.splits.empty_files())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    silence_the_stack()
    try:
        scored = predict(
            arguments.run, arguments.data, arguments.out, arguments.on_bad_row, arguments.device, arguments.dtype
        )
    except (DataError, OSError, ValueError) as error:
        print(f"launch.predict: {error}", file=sys.stderr)
        return 1
    print(f"{scored.rows:,} rows → {arguments.out}")
    for name in scored.empty_files:
        print(f"{name} has no rows and is left out")
    if scored.bad_rows.count:
        print(f"{scored.bad_rows.count:,} malformed rows have no score, the first is {scored.bad_rows.first}")
    if scored.quality.samples:
        q = scored.quality
        print(f"{q.samples:,} with labels: AUC {q.auc:.4f}  logloss {q.logloss:.4f}  NE {q.ne:.4f}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="the folder of a run that came to its end")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="of the run's data.format; patterns are resolved"
    )
    parser.add_argument("--out", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument("--on-bad-row", choices=("error", "skip"), help="default: as in the run's config")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="fp32", help="of rows of embeddings; int8 and int4 run on the CPU"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
