"""Exports the model of a run's folder: ``python -m examples.serving.export_run --run runs/demo --out served``.

Writes a package of AOTInductor, the library that a process loads before it, and some rows of the run's test split.
"""

import argparse
import shutil
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from torch.export import Dim
from torchrec import KeyedJaggedTensor

from launch.data.loader import Data
from launch.data.split import open_splits
from launch.predict import Dtype, Run
from torchrec_qr.inference import operators_library, write_package


class Scores(nn.Module):
    """Dense features (B, D), ids (N,) and lengths (F, B) of F features → the probability (B,) of each row."""

    def __init__(self, model: nn.Module, features: list[str]) -> None:
        super().__init__()
        self.model, self.features = model, features

    def forward(self, dense: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        batch = KeyedJaggedTensor(keys=self.features, values=ids, lengths=lengths.flatten())
        return self.model(dense, batch).squeeze(1).sigmoid()


def export_run(run: Path, out: Path, dtype: Dtype = "fp32", num_rows: int = 100) -> None:
    """Exports the model of the folder ``run`` into the folder ``out``, with rows of tables of type ``dtype``."""
    opened = Run(run, torch.device("cpu"), dtype)
    splits = open_splits(opened.job.data, opened.job.rows_of_features())
    with Data(opened.job, splits, opened.meaning).test() as batches:
        batch = next(iter(batches))
    features = batch.sparse.keys()
    lengths = batch.sparse.lengths().view(len(features), -1)[:, :num_rows].long().contiguous()
    ids = [x.values()[: int(n.sum())] for x, n in zip(batch.sparse.to_dict().values(), lengths, strict=True)]
    rows = (batch.dense[:num_rows].contiguous(), torch.cat(ids), lengths)
    dynamic = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, {1: Dim.DYNAMIC})  # B, N, B
    with torch.no_grad():
        program = torch.export.export(Scores(opened.model, features).eval(), rows, dynamic_shapes=dynamic)
    write_package(program, out / "model.pt2")
    shutil.copy(operators_library(), out / "serving_operators.so")
    # Copy the rows, because the export has left attributes on the tensors, which C++ does not read.
    torch.save(tuple(tensor.clone() for tensor in rows), out / "rows.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the folder of a run that came to its end")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="fp32", help="of the rows of tables")
    export_run(**vars(parser.parse_args()))
