"""The memory that a step takes, and memory that steps hand on to one another."""

import subprocess
import sys
import threading

import pytest
import torch

from torchrec_qr.ops import memory
from torchrec_qr.ops.backends.cpu import available
from torchrec_qr.ops.memory import recycled

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")

STEP = """
import sys
import torch
from torchrec_qr.ops.arguments import Batch
from torchrec_qr.ops.description import Description, PartitionLayout, TableLayout
from torchrec_qr.ops.lookup import stepped_lookup
from torchrec_qr.ops.update_rules import Sgd, Update

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(1)
num_ids, dim, (m, hot, bags) = 200_000, 64, map(int, sys.argv[1:])
quotients = -(-num_ids // m)
layout = TableLayout("mult", (PartitionLayout(dim, 1, m), PartitionLayout(dim, m, quotients)), num_ids=num_ids)
weights = [torch.ones(m, dim, requires_grad=True), torch.ones(quotients, dim, requires_grad=True)]
tables, updates = Description([layout], ["t"]), lambda: [Update(Sgd(), {}, 0.01)] * 2

def step(ids, offsets, gradient):
    stepped_lookup(tables, weights, Batch(ids, offsets, None, True), updates).backward(gradient)

step(torch.arange(2), torch.arange(3), torch.ones(2, dim))  # what a first step loads is not a step's
ids, offsets, gradient = torch.randint(num_ids, (bags * hot,)), torch.arange(bags + 1) * hot, torch.ones(bags, dim)
rows = sum(len((ids // d % n).unique()) for d, n in ((1, m), (m, quotients)))
print(rows)
before = kib("VmSize")
step(ids, offsets, gradient)
print((kib("VmPeak") - before) * 1024)
"""


@linux
@pytest.mark.parametrize(
    ("m", "hot", "bags"),
    [(4, 10, 20_000), *(pytest.param(447, *c, marks=pytest.mark.slow) for c in ((10, 20_000), (1, 200_000)))],
)
def test_a_step_takes_output_and_unique_rows(m: int, hot: int, bags: int) -> None:
    """It also takes 16 bytes an id, to sort them, but no (N, K, D) floats, which are 98 MiB here."""
    if not available():
        pytest.skip("the CPU kernels are not built")
    run = subprocess.run(
        [sys.executable, "-c", STEP, str(m), str(hot), str(bags)],
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    rows, growth = map(int, run.stdout.split())
    allowed = 4 * 64 * (bags + rows) + 16 * bags * hot
    assert growth < allowed + 8 * 2**20, (growth, allowed)
    assert growth > 4 * 64 * bags  # or the measurement has missed the output


LARGE = (1024, 2048)


@linux
def test_memory_is_reused_once_the_last_view_is_gone() -> None:
    first = recycled(LARGE, torch.float32).fill_(1)
    address, view = first.data_ptr(), first[512:]
    del first
    second = recycled(LARGE, torch.float32).fill_(2)
    assert view.sum() == view.numel()
    del view
    assert recycled((600, 2048), torch.float32).data_ptr() == address
    # Less than half would waste it.
    assert recycled((511, 4096), torch.uint16).data_ptr() != address
    assert (second == 2).all()


@linux
def test_memory_of_other_sizes_is_let_go() -> None:
    del memory._free[:]
    held = recycled((1, 64 << 20), torch.uint8)
    del held
    assert [len(block.memory) for block in memory._free] == [64 << 20]
    for _ in range(memory._KEPT):
        recycled(LARGE, torch.float32)
    assert [len(block.memory) for block in memory._free] == [8 << 20]


@linux
def test_a_system_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    del memory._free[:]
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 9999)  # which every Linux refuses, as one without them does 14
    assert recycled(LARGE, torch.float32).fill_(1).sum() == 1024 * 2048


@linux
def test_threads_never_share_memory() -> None:
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            out = recycled(LARGE, torch.float32)
            out[::64] = number
            if not (out[::64] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_small_tensors_are_torchs_own() -> None:
    out = recycled((2, 3), torch.bfloat16)
    assert out.shape == (2, 3)
    assert out.resize_(4, 4).shape == (4, 4)
