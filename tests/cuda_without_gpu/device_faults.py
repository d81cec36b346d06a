"""Faults that `fake_cuda` must see, each by itself, because a broken recorder would see none; and what has none."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import torchrec_qr
from launch.data.batch import BatchMaker
from launch.data.rows import Rows
from launch.metrics import Predictions, quality
from torchrec_qr.ids import IdSpace, bounded_ids
from torchrec_qr.ops.triton_kernels.occurrences import keys_of_ids

HERE = torch.device("cuda", 0)


def _ids() -> Tensor:
    return torch.arange(4, device=HERE)


def _below_autograd(to: torch.device) -> Tensor:
    """A copy as the implementation of an operator makes it."""
    with torch._C._AutoDispatchBelowAutograd():
        return _ids().to(to)


def _id_out_of_range() -> None:
    """Is told once its extremes have reached the host."""
    bounded_ids(_ids() + 7, IdSpace("t", "f", 10, "error"))
    torchrec_qr.raise_pending()


def _batch() -> None:
    """A batch of the job's data, whose numbers of ids input dist reads."""
    rows = Rows(np.zeros(4, np.float32), np.zeros((4, 2), np.float32), np.zeros((4, 3), np.int64), (1, 2))
    features = BatchMaker(["f", "g"], pinned=True)(rows).to(HERE, non_blocking=True).sparse
    assert features.dist_splits([1, 1]) == [[4, 4], [4, 8]]
    assert features.offset_per_key() == [0, 4, 12]


def _metrics() -> None:
    """Computes the metrics of the predictions since the last line of metrics."""
    predictions = Predictions()
    for _ in range(2):
        predictions.add(*torch.ones(3, 4, device=HERE))
    quality(*predictions.gather(HERE))


FAULTS: dict[str, Callable[[], object]] = {
    "an item": lambda: _ids().sum().item(),
    "a list": lambda: _ids().tolist(),
    "a condition": lambda: bool((_ids() > 2).any()),
    "rows that are not zero": lambda: _ids().nonzero(),
    "unique ids": lambda: _ids().unique(),
    "rows by a mask": lambda: _ids()[_ids() > 2],
    "a stream": lambda: torch.cuda.current_stream().synchronize(),
    "a list on the device": lambda: torch.tensor([1, 2], device=HERE),
    "a copy to the device": lambda: torch.ones(2).to(HERE),
    "a copy to the host": lambda: _ids().cpu(),
    "a copy to the host below autograd": lambda: _below_autograd(torch.device("cpu")),
    "a copy of memory that is not pinned": lambda: torch.ones(2).to(HERE, non_blocking=True),
    "a copy of pinned memory": lambda: torch.ones(2).pin_memory().to(HERE, non_blocking=True),
    "a batch of the loader": _batch,
    "metrics of a window": _metrics,
    "an address on the host": lambda: _ids().data_ptr(),
    "a sum over devices": lambda: _ids() + torch.arange(4, device="cuda:1"),
    "a launch beside the current device": lambda: keys_of_ids[(1,)](torch.arange(4, device="cuda:1")),
    "a launch on memory of the host": lambda: keys_of_ids[(1,)](_ids(), torch.arange(4)),
    "an id out of range": _id_out_of_range,
    "a grid that the device knows": lambda: keys_of_ids[(_ids()[1],)](_ids()),
}
