"""Golden files: floats that training must reproduce, and the machine on which they were recorded."""

import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.distributed.ranks import run_ranks
from tests.golden.golden_cells import RANKS_PER_NODE, WORLD_SIZE, losses
from tests.launch.jobs import SMALL, run, with_set
from tests.run_metrics import metrics
from torchrec_qr.ops.cpu_library import status

# Other instruction sets and versions of torch add in another order, which moved losses by up to 3e-7. PyTorch's lookups
# in place of the kernels also round fp16 tables elsewhere, which moved them by up to 7e-6.
RELATIVE_TOLERANCE = 3e-5
_OVERRIDES = (*SMALL, "train.log_every=1", "train.eval_every=5")
_NUMBERS = ("logloss", "auc", "calibration")

Machine = dict[str, Any]
Curves = dict[str, list[float]]


def machine() -> Machine:
    """Returns what decides the order of additions on a CPU, in the process that calls it."""
    vendors = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("vendor_id")]
    return {
        "torch": torch.__version__,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendors[0] if vendors else sys.platform,
        "lookups": status(),
        "threads": torch.get_num_threads(),
    }


def cells() -> tuple[Machine, Curves]:
    """Returns the machine, and per cell the loss of each step, summed over the ranks."""
    per_rank = run_ranks(_machine_and_losses, WORLD_SIZE, local_world_size=RANKS_PER_NODE, alone=True)
    names = per_rank[0][1]
    return per_rank[0][0], {
        n: [math.fsum(step) for step in zip(*(c[n] for _, c in per_rank), strict=True)] for n in names
    }


def demo() -> tuple[Machine, Curves]:
    """Returns the machine, and the curves of configs/demo.yaml on two ranks, shortened: by split and number."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "machine.json"
        run(Path(folder), *with_set(*_OVERRIDES), prepare=partial(_write_machine, file))
        curves: Curves = {}
        for line in metrics(Path(folder) / "demo"):
            for number in _NUMBERS:
                curves.setdefault(f"{line['split']} {number}", []).append(line[number])
        return json.loads(file.read_text()), curves


RECORDINGS: dict[str, Callable[[], tuple[Machine, Curves]]] = {"cells": cells, "demo": demo}


def read(name: str) -> tuple[Machine, Curves]:
    """Returns what the golden file of this name holds."""
    content = json.loads(_path_of(name).read_text())
    return content["machine"], {n: [float.fromhex(value) for value in curve] for n, curve in content["curves"].items()}


def write(name: str, machine: Machine, curves: Curves) -> None:
    """Writes the golden file of this name: a line per curve, floats as hexadecimal, which is exact."""
    lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps([v.hex() for v in curve])}" for n, curve in curves.items())
    _path_of(name).write_text(f'{{\n "machine": {json.dumps(machine)},\n "curves": {{\n{lines}\n }}\n}}\n')


def differences(name: str, machine: Machine, curves: Curves) -> list[str]:
    """Returns a line per curve that differs from the file: in one bit, or on another machine by the tolerance."""
    recorded_on, recorded = read(name)
    tolerance = 0.0 if machine == recorded_on else RELATIVE_TOLERANCE
    lines = [f"{n}: in the file or in the training, not in both" for n in sorted(recorded.keys() ^ curves.keys())]
    for n in (n for n in curves if n in recorded):
        pairs = list(zip(curves[n], recorded[n], strict=True))
        wrong = [i for i, (a, b) in enumerate(pairs) if not math.isclose(a, b, rel_tol=tolerance)]
        if wrong:
            a, b = pairs[wrong[0]]
            lines.append(f"{n}[{wrong[0]}]: {b!r} became {a!r}, another by {abs(a - b) / abs(b):.1e} of it")
    return lines


def _path_of(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.json")


def _machine_and_losses(rank: int, world_size: int) -> tuple[Machine, Curves]:
    return machine(), losses(rank, world_size)


def _write_machine(file: Path, rank: int) -> None:
    if rank == 0:
        file.write_text(json.dumps(machine()))


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
