"""The CPU kernels against a float64 reference: forward, gradients and ten steps, in every instruction set there is."""

from typing import Any

import pytest
import torch
from kernel_reference import RULES, StepCase, train
from near import assert_near
from pairwise import pairwise

from torchrec_qr.ops import cpu_library
from torchrec_qr.ops.backends import cpu
from torchrec_qr.ops.cpu_library import without_kernels
from torchrec_qr.ops.update_rules import Sgd, Update

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")

FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": (
        ("hash", 1),
        ("wide", 1),
        ("strided", 2),
        ("adjacent", 2),
        ("explicit", 2),
        ("wide", 2),
        ("chinese_remainder", 3),
        ("mixed_radix", 4),
        ("wide", 3),
        ("wide", 4),
    ),
    "operation": ("mult", "add", "concat"),
    "dim": (4, 12, 16, 20, 32, 64, 68, 128, 256, 1024),
    "rule": tuple(RULES),
    "decay": ((0.0, "l2"), (0.25, "l2"), (0.25, "decoupled")),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "weighted": (False, True),
    "id_dtype": (torch.int64, torch.int32),
    "offset_dtype": (torch.int64, torch.int32),
    "isa": cpu_library.ISAS,
    "threads": (1, 3),
    "hashed": (False, True),
}


@pytest.mark.parametrize("given", pairwise(FACTORS), ids=lambda c: "-".join(str(v) for v in c.values()))
def test_ten_steps(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict(given)
    isa, threads = given.pop("isa"), given.pop("threads")
    monkeypatch.setenv(cpu_library.VARIABLE, isa)
    (kind, k), dtype = given.pop("kind"), given["dtype"]
    given["weight_decay"], given["mode"] = given.pop("decay")
    rtol = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    case = StepCase(kind, k, **given)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        train(case, rtol)
    finally:
        torch.set_num_threads(before)


def best_isa() -> int:
    library = cpu_library.library()
    assert library is not None
    return int(library.qr_best_isa())


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
@pytest.mark.parametrize("rule", RULES)
def test_ten_steps_in_pytorch(rule: str, operation: str) -> None:
    """The backend that the kernels give way to: of every operation and rule, with repeated ids and empty bags."""
    kinds = {"mult": ("explicit", 2), "add": ("wide", 3), "concat": ("strided", 2)}
    with without_kernels():
        for dtype, rtol in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
            train(StepCase(*kinds[operation], operation, rule=rule, dtype=dtype, weighted=True), rtol)
        mode = "l2" if operation == "add" else "decoupled"
        train(StepCase(*kinds[operation], operation, rule=rule, weight_decay=0.25, mode=mode), 2e-5)


@pytest.mark.parametrize("rule", RULES)
def test_untouched_rows_do_not_move(rule: str) -> None:
    assert train(StepCase("wide", 2, rule=rule), 2e-5) > 400


@pytest.mark.parametrize("operation", ["mult", "concat"])
def test_rows_that_do_not_fit_the_sort_keys(operation: str) -> None:
    """The backward then sorts places in the batch, and looks rows and bags up from there."""
    train(StepCase("vast", 4, operation=operation, rule="adagrad", weighted=True), 2e-5)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("kind", [("hash", 1), ("strided", 2), ("chinese_remainder", 3)])
def test_hot_rows(kind: tuple[str, int], threads: int) -> None:
    """Nine tenths of the ids are one; enough of them that a table is accumulated in parts."""
    case = StepCase(*kind, operation="mult", dim=64, rule="adagrad", num_bags=260, hot=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(2):
            out, expected, _, _ = case.run(step)
            assert_near(out, expected, 1e-4, "output")
    finally:
        torch.set_num_threads(before)
    for w, exact in zip(case.stored, case.exact, strict=True):
        assert_near(w.detach(), exact.detach(), 1e-4, "weight")


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_gradients_are_clipped_entry_by_entry(rule: str) -> None:
    train(StepCase("strided", 2, rule=rule, max_gradient=0.25), 2e-5)
    train(StepCase("strided", 2, rule=rule, max_gradient=0.25, dim=64), 2e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_bitwise_the_same_again(threads: int) -> None:
    """The same whatever the threads did, for a fixed number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for _ in range(3):
            case = StepCase("strided", 2, dim=64, rule="adam", weighted=True, hot=True, num_bags=300)
            outputs = [case.run(step)[0] for step in range(2)]
            results.append([*outputs, *case.stored, *(s for of in case.states for s in of.values())])
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_are_torch_s(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of 16 bits is widened exactly, and a step of zero rounds it back to itself, bit for bit.

    Values between two of them go to the nearest, ties to even.
    """
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    stored = bits.view(dtype).view(-1, 64).clone()
    rows = torch.arange(stored.shape[0])
    for isa in cpu_library.ISAS[: best_isa() + 1]:
        monkeypatch.setenv(cpu_library.VARIABLE, isa)
        weight = stored.clone()
        update = Update(Sgd(), {}, 1.0)
        cpu.update_rows(weight, rows, torch.zeros(weight.shape), update)
        number = ~stored.isnan()
        assert torch.equal(weight[number].view(torch.int16), stored[number].view(torch.int16))
        assert weight[~number].isnan().all()
        steps = torch.randn(stored.shape) * torch.logspace(-9, 5, stored.numel()).view(stored.shape)
        weight = torch.zeros(stored.shape, dtype=dtype)
        cpu.update_rows(weight, rows, steps, update)
        assert torch.equal(weight, (-steps).to(dtype))
        halfway = (stored.float() + torch.nextafter(stored, torch.tensor(torch.inf, dtype=dtype)).float()) / 2
        finite = halfway.isfinite().all(dim=1)
        weight = torch.zeros(stored.shape, dtype=dtype)
        cpu.update_rows(weight, rows, -halfway, update)
        assert torch.equal(weight[finite], halfway[finite].to(dtype))
