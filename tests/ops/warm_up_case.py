"""Warms up tables and then steps them, with the real compiler of Triton and a driver that launches nothing.

`test_warm_up` runs this as a process of its own, since the driver is one for the process. It prints a line of JSON:
the kernels that each part has compiled.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

sys.path.insert(0, str(Path(__file__).parents[2]))

from torchrec_qr.ops import triton, warm_up
from torchrec_qr.ops.arguments import GRADIENT, RULES, Batch, Gradients, num_states
from torchrec_qr.ops.layout import PartitionLayout, TableLayout, encode
from torchrec_qr.ops.lookup import Lookup

FEATURES = 3


class NoLaunch:
    """A kernel that is bound and not launched."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class CompilesOnly:
    """A driver of a GPU that is not there: what it is asked to run has been compiled for sm_90."""

    launcher_cls = NoLaunch

    def __init__(self) -> None:
        self.utils = self

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 0, 0, 32, 0, 1024

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiled() -> Iterator[list[str]]:
    """Lists the kernels that are compiled meanwhile."""
    names: list[str] = []
    compile_one = jit.JITFunction._do_compile

    def listed(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return compile_one(self, *args, **kwargs)

    jit.JITFunction._do_compile = listed
    try:
        yield names
    finally:
        jit.JITFunction._do_compile = compile_one


def tables_of(dtype: torch.dtype) -> tuple[Lookup, list[Tensor]]:
    """A product and a sum, of two features and one; the sum's second partition is replicated, in fp32."""
    qr = (PartitionLayout(16, 1, 40), PartitionLayout(16, 40, 5))
    layout = encode([TableLayout("mult", qr, 2, 200), TableLayout("add", qr, 1, 200)])
    weights = [torch.randn(rows, 16) for rows in (40, 5, 40, 5)]
    return Lookup(layout, ["a", "b"], []), [w.to(dtype) if i < 3 else w for i, w in enumerate(weights)]


def steps_of(rule: str, weights: list[Tensor]) -> Gradients:
    rules = [RULES[rule]] * 3 + [GRADIENT]
    shapes = [w.shape[:1] if rule == "rowwise_adagrad" else w.shape for w in weights]
    states = [torch.zeros(s) for r, s in zip(rules, shapes, strict=True) for _ in range(num_states(r))]
    return Gradients(rules, states, [0.1, 1e-3, 0.9, 0.99, 0.1, 0.01, -1.0] * 4, [])


def step(tables: Lookup, weights: list[Tensor], steps: Gradients, bags: int, pooled: bool, weighted: bool) -> None:
    groups = FEATURES * (bags if pooled else 1)
    offsets = torch.arange(groups + 1) * 3
    ids = torch.zeros(3 * groups, dtype=torch.int64)
    batch = Batch(ids, offsets, torch.ones(len(ids)) if weighted else None, pooled)
    given = weights, tables.class_maps, batch, tables.layout, "a\nb"
    # Nothing runs, so that what memory holds by chance must not be taken for a verdict: the calls read none here.
    triton._Call.done = lambda self: None  # type: ignore[method-assign]
    out = triton.look_up(*given)
    triton.propagate(torch.zeros_like(out), *given, steps, weighted)


def main(rule: str, dtype: str, pooled: bool, weighted: bool) -> None:
    driver.set_active(CompilesOnly())
    tables, weights = tables_of(getattr(torch, dtype))
    steps = steps_of(rule, weights)
    with compiled() as before:
        warm_up.launch_every_kernel(tables, weights, steps, pooled, weighted)
    with compiled() as after:
        for bags in (16, 17, 1_000):
            step(tables, weights, steps, bags, pooled, weighted)
    print(json.dumps({"warm_up": sorted(set(before)), "steps": after}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "pooled", sys.argv[4] == "weighted")
