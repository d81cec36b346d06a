"""The kernels of the device against the float64 reference. Needs neither TorchRec nor FBGEMM.

If those, or Hypothesis, are missing, run ``python -m pytest --confcutdir tests/gpu tests/gpu/test_gpu_kernels.py``.
"""

from typing import Any

import pytest
import torch
from gpu_setups import DEVICE
from kernel_reference import StepCase, one_table, train
from near import assert_near
from pairwise import pairwise
from torch import Tensor

from torchrec_qr import raise_pending
from torchrec_qr.ops.arguments import Batch
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.dispatch import available
from torchrec_qr.ops.lookup import look_up

FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": (("hash", 1), ("wide", 2), ("explicit", 2), ("chinese_remainder", 3), ("mixed_radix", 4)),
    "operation": ("mult", "add", "concat"),
    "dim": (4, 12, 16, 64, 68, 128, 1024),
    "rule": ("sgd", "adagrad", "rowwise_adagrad", "adam", "amsgrad"),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "weighted": (False, True),
    "id_dtype": (torch.int64, torch.int32),
    "offset_dtype": (torch.int64, torch.int32),
}
RTOL = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class StepOnDevice(StepCase):
    """The stored tables, their state and the batch lie on the device, the reference on the host."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stored = [w.detach().to(DEVICE).requires_grad_() for w in self.stored]
        self.states = [{name: state.to(DEVICE) for name, state in of.items()} for of in self.states]
        maps = [m.to(DEVICE) for m in self.tables.class_maps]
        self.tables = Description(self.tables.tables, self.tables.names, maps)

    def look_up(self, ids: Tensor, offsets: Tensor, id_weights: Tensor | None, step: int) -> Tensor:
        weights = None if id_weights is None else id_weights.to(DEVICE)
        return super().look_up(ids.to(DEVICE), offsets.to(DEVICE), weights, step).cpu()


def test_the_kernels_are_there() -> None:
    assert available(torch.device(DEVICE)), f"PyTorch would take the place of the kernels for {DEVICE}"


@pytest.mark.parametrize("given", pairwise(FACTORS), ids=lambda c: "-".join(str(v) for v in c.values()))
def test_ten_steps(given: dict[str, Any]) -> None:
    (kind, k), rest = given["kind"], {name: value for name, value in given.items() if name != "kind"}
    train(StepOnDevice(kind, k, **rest), RTOL[given["dtype"]])


@pytest.mark.parametrize("kind", [("hash", 1), ("strided", 2), ("chinese_remainder", 3)])
def test_hot_rows(kind: tuple[str, int]) -> None:
    """Nine tenths of the ids are one, in several thousand places."""
    case = StepOnDevice(*kind, dim=64, rule="adagrad", num_bags=260, hot=True)
    for step in range(2):
        out, expected, _, _ = case.run(step)
        assert_near(out, expected, 1e-4, "output")
    for w, exact in zip(case.stored, case.exact, strict=True):
        assert_near(w.detach(), exact.detach(), 1e-4, "weight")


def test_bitwise_the_same_again() -> None:
    results = []
    for _ in range(3):
        case = StepOnDevice("strided", 2, dim=64, rule="adam", weighted=True, hot=True, num_bags=300)
        outputs = [case.run(step)[0] for step in range(2)]
        results.append([*outputs, *case.stored, *(s for of in case.states for s in of.values())])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize(
    ("ids", "offsets", "error", "message"),
    [
        ((0, 4, 5), (0, 3), IndexError, r"table 't': id 5 \(number 2\) is out of range \[0, 5\)"),
        ((0, -1, 1), (0, 3), IndexError, "id -1 "),
        ((0, 1, 2), (0, 2), ValueError, r"offsets\[1\] = 2; allowed: offsets from 0 to the number of ids, 3"),
        ((0, 1, 2), (0, 2, 1, 3), ValueError, r"offsets\[2\] = 1 is less than the offset before it"),
    ],
)
def test_bad_input_is_raised_by_raise_pending_at_the_latest(
    ids: tuple[int, ...], offsets: tuple[int, ...], error: type[Exception], message: str
) -> None:
    tables, (weight,) = one_table()
    stored = weight.to(DEVICE)

    def look_up_bad_input() -> None:
        look_up(tables, [stored], Batch(ints(*ids), ints(*offsets), None, True))
        raise_pending()

    with pytest.raises(error, match=message):
        look_up_bad_input()
    # The error is told once, and a right batch is looked up.
    raise_pending()
    out = look_up(tables, [stored], Batch(ints(0, 4), ints(0, 2), None, True))
    raise_pending()
    assert_near(out, weight[[0, 4]].sum(dim=0, keepdim=True).double(), 1e-6, "after an error")
