"""The Triton kernels compile offline, without a GPU, to code of three generations that spills no register.

Between versions of Triton (seen: 3.6.0, 3.7.1, 3.9.0) differs the ptxas that serves an architecture: the one named
ptxas-blackwell from sm_90 or from sm_100 on. It is asked of Triton, and the target, with its suffix, of the PTX.
"""

import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, compile

from torchrec_qr.ops.triton_kernels import forward, occurrences, steps, sums
from torchrec_qr.ops.triton_kernels import launches as run

pytestmark = pytest.mark.timeout(600)

ARCHITECTURES = (80, 90, 100)
POINTERS = {
    "int64": ("ids", "offsets", "entries", "flat_starts", "failure", "order", "rows", "weights"),
    "int32": (
        "bag_of",
        "entry_of",
        "target_of",
        "chunk_numbers",
        "starts",
        "entry_of_chunk",
        "weight_of_chunk",
        "keys",
    ),
    "float32": ("out", "out_gradient", "of_ids", "id_weights", "sums", "gradients", "numbers"),
}
TYPE_OF = {name: {"int64": "*i64", "int32": "*i32", "float32": "*fp32"}[t] for t, of in POINTERS.items() for name in of}
TYPE_OF["weight_of_row"] = "*i32"


class Case(NamedTuple):
    kernel: Any
    fixed: dict[str, Any]
    id: str


def _of(width: int, **fixed: Any) -> dict[str, Any]:
    plain = {"K": 2, "WIDTH": width, "TYPES": 0, "ALIGN": 16, "MULT": True, "MAP": 0, "CODED": False}
    return {**plain, "OUT_ALIGN": 4, "POOLED": True, "WEIGHTED": True, **run._tile(width), **fixed}


def cases(width: int) -> list[Case]:
    """Every kernel at one width, in the form that holds most at once."""
    # Four partitions of a product, of fp16, bf16 and fp32, and ids that travel as codes.
    heavy = {"K": 4, "TYPES": 0b00_00_10_01, "ALIGN": 8, "CODED": True}
    sequence = {"POOLED": False, "WEIGHTED": False, "MAP": 2, "MULT": False}
    cut = {"CHUNK": 32, "SUPER": 64, **run._tile(width)}
    out = [
        Case(forward.forward, _of(width, **heavy), "forward"),
        Case(forward.forward, _of(width, **sequence), "forward-sequence"),
        Case(forward.weights_gradient, _of(width, **heavy, **run._short_tile(width)), "weights_gradient"),
        Case(occurrences.keys_of_ids, _of(width, TARGET=1, LANES=128, CODED=True), "keys_of_ids"),
        Case(occurrences.chunks_of_keys, {"BLOCK": 256}, "chunks_of_keys"),
        Case(sums.sum_chunks, _of(width, TARGET=3, **heavy, **run._short_tile(width)), "sum_chunks"),
        Case(sums.sum_supers, cut, "sum_supers"),
        Case(sums.sum_runs, cut, "sum_runs"),
    ]
    for rule in ("ROWWISE_ADAGRAD", "AMSGRAD"):
        step = {"RULE": getattr(steps, rule).value, "WIDTH": width, "TYPE": 0, "ALIGN": 16, "STATE_ALIGN": 16}
        out.append(
            Case(steps.step_rows, {**step, "GRADIENT_ALIGN": 4, **run._tile(width)}, f"step_rows-{rule.lower()}")
        )
    return out


def compiled(case: Case, architecture: int) -> Any:
    names = case.kernel.arg_names
    fixed = {n: v for n, v in case.fixed.items() if n in names}
    if "id_weights" in names and not case.fixed["WEIGHTED"]:
        fixed["id_weights"] = None
    signature = {n: "constexpr" if n in fixed else TYPE_OF.get(n, "i32") for n in names}
    # As a launch says of tensors, whose memory PyTorch aligns, and of the distances between rows of these.
    aligned = [
        i for i, n in enumerate(names) if signature[n].startswith("*") or n in ("out_stride", "sums_stride", "width")
    ]
    source = ASTSource(case.kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return compile(source, target=GPUTarget("cuda", architecture, 32))


def spills(ptx: str, architecture: int, directory: Path) -> list[str]:
    """What ``ptxas -v`` says of a kernel: its lines on the stack and on registers."""
    (directory / "kernel.ptx").write_text(ptx)
    target = re.search(r"^\.target (\S+?),?$", ptx, re.MULTILINE)
    assert target is not None
    command = [nvidia.get_ptxas(architecture).path, "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=True)
    return re.findall(r".*(?:bytes stack frame|Used \d+ registers).*", done.stderr)


WIDTHS = (64, 128, 256)
# Every kernel for every architecture, and every kernel at every width.
TURNS = [
    pytest.param(cases(width)[i], architecture, id=f"{cases(width)[i].id}-{width}-sm_{architecture}")
    for i in range(len(cases(64)))
    for a, architecture in enumerate(ARCHITECTURES)
    for width in [WIDTHS[(i + a) % 3]]
]


@pytest.mark.parametrize(("case", "architecture"), TURNS)
def test_compiles_without_spills(case: Case, architecture: int, tmp_path: Path) -> None:
    ptx = compiled(case, architecture).asm["ptx"]
    stack, registers = spills(ptx, architecture, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in stack, registers


NARROW = [
    pytest.param(width, mult, weighted, pooled, id=f"{width}-{'mult' if mult else 'add'}-{'w' * weighted}{pooled}")
    for i, width in enumerate((4, 8, 12, 16, 32))
    for j, (mult, weighted, pooled) in enumerate(product((True, False), repeat=3))
    if (i + j) % 2 == 0
]


@pytest.mark.parametrize(("width", "mult", "weighted", "pooled"), NARROW)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_of_narrow_rows_compile(width: int, mult: bool, weighted: bool, pooled: bool, architecture: int) -> None:
    """With more lanes than the launch takes, which is what narrow rows would have, they do not."""
    form = {"MULT": mult, "WEIGHTED": weighted, "POOLED": pooled, "TARGET": 1, **run._short_tile(width)}
    assert compiled(Case(sums.sum_chunks, _of(width, **form), ""), architecture).asm["ptx"]


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "sequences"])
@pytest.mark.parametrize("width", [4, 16, 32])
def test_other_loops_over_narrow_rows_compile(width: int, pooled: bool) -> None:
    for kernel, tile in ((forward.forward, run._tile(width)), (forward.weights_gradient, run._short_tile(width))):
        assert compiled(Case(kernel, _of(width, POOLED=pooled, **tile), ""), 90).asm["cubin"]


@pytest.mark.parametrize("kernel", [forward.forward, sums.sum_chunks], ids=["forward", "sum_chunks"])
def test_rows_are_read_16_bytes_at_a_time(kernel: Any, tmp_path: Path) -> None:
    """A thread's read of one number at a time takes four times the instructions: addresses must be known as aligned."""
    ptx = compiled(Case(kernel, _of(64, TARGET=1), ""), 90).asm["ptx"]
    # Two partitions, or a partition and the gradient, of a tile of two reads per thread each.
    assert len(re.findall(r"ld\.global\S*\.v4\.(?:b32|f32)\b", ptx)) >= 4
    assert "0 bytes spill stores, 0 bytes spill loads" in spills(ptx, 90, tmp_path)[0]


def test_cases_cover_every_kernel() -> None:
    of_modules = (forward, occurrences, sums, steps)
    launched = set(re.findall(r"(\w+)\[", Path(run.__file__).read_text()))
    kernels = {name for module in of_modules for name in vars(module) if name in launched}
    assert kernels == {case.kernel.fn.__name__ for case in cases(64)}
