"""The choice between kernels and PyTorch, by device, type and operation."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from torchrec_qr.ops.arguments import Replica, SentFeature
from torchrec_qr.ops.backends import Backend, cpu
from torchrec_qr.ops.description import MAX_WIDTH, Description
from torchrec_qr.ops.transforms import is_transformed
from torchrec_qr.ops.triton_compiler import load_driver
from torchrec_qr.ops.update_rules import Update

# Of weights in the kernels.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def available(device: torch.device) -> bool:
    """Returns whether there are kernels for a device."""
    return _has_triton() if device.type == "cuda" else device.type == "cpu" and cpu.available()


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return find_spec("triton") is not None


def kernels_take(tables: Description, weights: Sequence[Tensor]) -> bool:
    """Returns whether the kernels look up these tables: not under transforms, which PyTorch alone goes through."""
    return (
        tables.has_kernels
        and available(weights[0].device)
        and all(w.dtype in DTYPES for w in weights)
        and not is_transformed()
    )


def kernels_step(weight: Tensor) -> bool:
    """Returns whether the kernels step given rows of a weight; the MLPs of ``path`` may be wider than they take."""
    return weight.shape[1] <= MAX_WIDTH and weight.dtype in DTYPES and available(weight.device)


def kernels_on(device: torch.device) -> Backend:
    """Returns the kernels of a device that is `available`, once they can be launched."""
    if device.type == "cpu":
        return cpu
    # Here, because it imports Triton, which may be missing and is of no use on a CPU.
    from torchrec_qr.ops.backends import triton

    load_driver()
    return triton


def update_rows(weight: Tensor, rows: Tensor, gradients: Tensor, update: Update) -> None:
    """Steps ``rows`` (n,) int64, each once, of ``weight`` in place by their gradients (n, D_j).

    On a GPU a row of -1 is none, so that a caller need not wait for the number of rows.

    Example:
        >>> from torchrec_qr.ops.update_rules import Sgd
        >>> weight = torch.ones(3, 4)
        >>> update_rows(weight, torch.tensor([2]), torch.ones(1, 4), Update(Sgd(), {}, learning_rate=0.5))
        >>> weight[:, 0].tolist()
        [1.0, 1.0, 0.5]
    """
    if kernels_step(weight):
        kernels_on(weight.device).update_rows(weight, rows, gradients, update)
    elif weight.is_cuda:
        update.step_some(weight, rows, gradients)
    else:
        update.step(weight, rows, gradients)


def update_replicas(replicas: list[Replica]) -> None:
    """Steps replicas on a GPU that `kernels_step`, in one launch where they are alike."""
    from torchrec_qr.ops.backends import triton

    load_driver()
    triton.update_replicas(replicas)


class SendIds:
    """Prepares the ids of a batch on a GPU for sending, in one launch.

    Args:
        features (Sequence[SentFeature]): the features of each batch, in order.
    """

    def __init__(self, features: Sequence[SentFeature]) -> None:
        from torchrec_qr.ops.backends import triton

        load_driver()
        self._features = list(features)  # their class maps must live
        self._fields = triton.fields_of_sent(self._features)

    def __call__(self, ids: Tensor, offsets: Tensor, most_ids: int, raise_at: Callable[[int], None]) -> Tensor:
        """Returns what is sent of ids (N,), as int64.

        Args:
            ids (Tensor): (N,) int32 or int64, feature after feature.
            offsets (Tensor): (F·B + 1,) of their bags.
            most_ids (int): the number of ids of the feature with most.
            raise_at (Callable[[int], None]): raises the error of the id of a number, which a later call calls.
        """
        from torchrec_qr.ops.backends import triton

        return triton.send_ids(self._fields, ids, offsets, most_ids, raise_at)
