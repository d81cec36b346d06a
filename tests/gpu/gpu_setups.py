"""The device that these tests compute on, and the ranks."""

import os
from typing import NamedTuple

import torch

_VARIABLE = "TORCHREC_QR_GPU_TESTS_DEVICE"
DEVICE = os.environ.get(_VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE not in ("cuda", "cpu") or (DEVICE == "cuda" and not torch.cuda.is_available()):
    raise RuntimeError(f"{_VARIABLE}={DEVICE}: allowed: cpu, or cuda where torch finds a GPU")


class Setup(NamedTuple):
    """Ranks of one backend, each on a device of its own or all on one, as gloo can and NCCL cannot."""

    backend: str
    world_size: int
    device: str

    def __str__(self) -> str:
        return f"{self.backend}_{self.world_size}"


def _setups() -> list[Setup]:
    if DEVICE == "cpu":
        return [Setup("gloo", 2, "cpu")]
    several = [Setup("nccl", 2, "cuda")] if torch.cuda.device_count() > 1 else []
    return [Setup("nccl", 1, "cuda"), *several, Setup("gloo", 2, "cuda:0")]


SETUPS = _setups()
# Setups of several ranks; on one GPU only gloo's.
OF_SEVERAL = [setup for setup in SETUPS if setup.world_size > 1]
# gloo copies CUDA tensors to the host, for which the host waits. In a rehearsal gloo takes NCCL's place.
OF_NCCL = [setup for setup in SETUPS if setup.backend == "nccl"] or SETUPS
