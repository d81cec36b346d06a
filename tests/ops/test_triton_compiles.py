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

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, compile

from torchrec_qr.ops.triton_kernels import (
    backward_launches,
    forward,
    id_launches,
    launcher,
    launches,
    long_rows,
    occurrences,
    replica_launches,
    replicas,
    sent_ids,
    steps,
    sums,
)

pytestmark = pytest.mark.timeout(600)

ARCHITECTURES = (80, 90, 100)
# More leave a multiprocessor fewer than 20 warps, which hide the time of a read.
MOST_REGISTERS = 96
# A program that decodes row codes reads the numbers of its divisions, of 64 bits, once for all of its ids. The third
# is one architecture's, at D = 64, where two warps would leave each a quarter of a row.
MORE_REGISTERS = {"forward-coded": 128, "forward-heavy": 168, "sum_ranges-rowwise_adagrad": 106}
# ptxas reserves this in one case, though it spills nothing: bytes by case, D and architecture.
STACK_FRAMES = {("sum_ranges-rowwise_adagrad", 64, 80): 8}
# Triton 3.6, which torch 2.11 brings, spills one register in these cases; later versions spill none.
SPILLS = {("sum_ranges-three", 128, 100): 4, ("sum_ranges-amsgrad", 64, 80): 4} if triton.__version__ < "3.7" else {}
POINTERS = {
    "int64": (
        *("ids", "offsets", "entries", "flat_starts", "failure", "order", "rows", "weights"),
        *("sent", "features", "replicas"),
    ),
    "int32": ("entry_of", "first_block", "first_id", "first_feature", "weight_of_row", "starts", "keys"),
    "float32": (
        *("out", "out_gradient", "of_ids", "id_weights", "sums", "heads", "tails", "gradients", "numbers"),
        "gradients_of_replicas",
    ),
    "uint8": ("looked_up",),
}
TYPES = {"int64": "*i64", "int32": "*i32", "float32": "*fp32", "uint8": "*u8"}
TYPE_OF = {name: TYPES[t] for t, of in POINTERS.items() for name in of}
TYPE_OF |= {f"keys_{number}": "*i32" for number in range(4)}


class Case(NamedTuple):
    kernel: Any
    fixed: dict[str, Any]
    num_warps: int
    id: str


def _of(width: int, **fixed: Any) -> dict[str, Any]:
    tables = {"K": 2, "WIDTH": width, "TYPES": 0, "ALIGN": 16, "MULT": True, "MAP": 0, "GIVEN": 0, "NARROW": True}
    steps_of = {"TYPE": 0, "WEIGHT_ALIGN": 16, "STATE_ALIGN": 16, "GRADIENT_ALIGN": 4, "RULE": steps.SGD.value}
    tile = launches.tile_of(width)
    cuts = {"CHUNK": 32, "SUPER": 64, "LANES": tile.lanes, "BLOCK_D": tile.block_d, "BLOCK_T": 32}
    batch = {"OUT_ALIGN": 4, "POOLED": True, "WEIGHTED": True, "TARGET": 1, "LAST": True, "PART": 0, "BLOCK": 256}
    return {**tables, **steps_of, **cuts, **batch, **fixed}


def case(kernel: Any, width: int, id: str, **fixed: Any) -> Case:
    given = _of(width, **fixed)
    # These take no tile of columns. A row alone is stepped once the rows of other partitions have been read.
    if kernel in (occurrences.keys_of_ids, sent_ids.send_ids):
        return Case(kernel, given, 4, id)
    alone = kernel in (steps.step_rows, replicas.step_replicas, long_rows.sum_long_rows, long_rows.sum_supers)
    has_step = alone or kernel is sums.sum_ranges
    rule = given["RULE"] if has_step else steps.NOTHING.value
    return Case(kernel, given, launches.warps_of(launches.tile_of(width), 1 if alone else given["K"], rule), id)


def cases(width: int) -> list[Case]:
    """Every kernel at one width: as most tables have it, and in the form that holds most at once."""
    # Four partitions of a product, of fp16, bf16 and fp32, and ids that travel as codes.
    heavy = {"K": 4, "TYPES": 0b00_00_10_01, "ALIGN": 8, "GIVEN": 1, "NARROW": False}
    replica = {"GRADIENT_ALIGN": 16}
    sequence = {"POOLED": False, "WEIGHTED": False, "MAP": 2, "MULT": False}
    out = [
        case(forward.forward, width, "forward", WEIGHTED=False),
        case(forward.forward, width, "forward-heavy", **heavy),
        case(forward.forward, width, "forward-sequence", **sequence),
        case(forward.weights_gradient, width, "weights_gradient", **heavy),
        case(occurrences.keys_of_ids, width, "keys_of_ids", LANES=128),
        case(occurrences.keys_of_ids, width, "keys_of_ids-heavy", LANES=128, **heavy),
        case(occurrences.blocks_of_tables, width, "blocks_of_tables"),
        case(sums.sum_ranges, width, "sum_ranges-waiting", LAST=False),
        case(sums.sum_ranges, width, "sum_ranges-heavy", **{**heavy, "TARGET": 3, "RULE": steps.AMSGRAD.value}),
        case(long_rows.sum_supers, width, "sum_supers"),
        case(forward.forward, width, "forward-coded", GIVEN=1, NARROW=False),
        case(forward.forward, width, "forward-hashed", GIVEN=2),
        case(occurrences.keys_of_ids, width, "keys_of_ids-hashed", LANES=128, GIVEN=2, NARROW=False),
        case(forward.forward, width, "forward-three", K=3),
        case(sums.sum_ranges, width, "sum_ranges-three", K=3, RULE=steps.ADAM.value),
        case(sent_ids.send_ids, width, "send_ids"),
        case(replicas.step_replicas, width, "step_replicas", RULE=steps.ADAGRAD.value, MASKED=False, **replica),
        case(replicas.step_replicas, width, "step_replicas-masked", RULE=steps.AMSGRAD.value, MASKED=True, **replica),
    ]
    for rule in ("SGD", "ROWWISE_ADAGRAD", "AMSGRAD"):
        number = getattr(steps, rule).value
        for kernel in (sums.sum_ranges, long_rows.sum_long_rows, steps.step_rows):
            out.append(case(kernel, width, f"{kernel.fn.__name__}-{rule.lower()}", RULE=number, WEIGHTED=False))
    for rule in ("ADAGRAD", "LAMB", "PARTIAL_ROWWISE_LAMB"):
        number = getattr(steps, rule).value + steps.DECAYS.value
        out.append(case(sums.sum_ranges, width, f"sum_ranges-{rule.lower()}-decays", RULE=number, WEIGHTED=False))
    return out


def compiled(case: Case, architecture: int) -> Any:
    names = case.kernel.arg_names
    fixed = {n: v for n, v in case.fixed.items() if n in names}
    if "id_weights" in names and not case.fixed["WEIGHTED"]:
        fixed["id_weights"] = None
    signature = {n: "constexpr" if n in fixed else TYPE_OF.get(n, "i32") for n in names}
    options = {"num_warps": case.num_warps}
    # A launch compiles it so: memory that PyTorch allocates is aligned, and other arguments have their types alone.
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") and n not in launcher._FROM_CALLERS]
    source = ASTSource(case.kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


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


@pytest.mark.slow
@pytest.mark.parametrize(("case", "architecture"), TURNS)
def test_compiles_without_spills(case: Case, architecture: int, tmp_path: Path) -> None:
    ptx = compiled(case, architecture).asm["ptx"]
    stack, registers = spills(ptx, architecture, tmp_path)
    key = (case.id, case.fixed.get("WIDTH"), architecture)
    spilled = SPILLS.get(key, 0)
    frame = STACK_FRAMES.get(key, 2 * spilled)
    assert f"{frame} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads" in stack, registers
    used = re.search(r"Used (\d+) registers", registers)
    assert used is not None
    assert int(used[1]) <= MORE_REGISTERS.get(case.id, MOST_REGISTERS)


NARROW = [
    pytest.param(width, mult, weighted, id=f"{width}-{'mult' if mult else 'add'}-{'w' * weighted}")
    for i, width in enumerate((4, 8, 12, 16, 32))
    for j, (mult, weighted) in enumerate(product((True, False), repeat=2))
    if (i + j) % 2 == 0
]


@pytest.mark.parametrize(("width", "mult", "weighted"), NARROW)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_of_narrow_rows_compile(width: int, mult: bool, weighted: bool, architecture: int) -> None:
    """Triton has failed on loops over rows of few columns: see `tile_of`."""
    assert compiled(case(sums.sum_ranges, width, "", MULT=mult, WEIGHTED=weighted), architecture).asm["ptx"]


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "sequences"])
@pytest.mark.parametrize("width", [4, 16, 32])
def test_other_loops_over_narrow_rows_compile(width: int, pooled: bool) -> None:
    for kernel in (forward.forward, forward.weights_gradient):
        assert compiled(case(kernel, width, "", POOLED=pooled), 90).asm["cubin"]


@pytest.mark.parametrize("kernel", [forward.forward, sums.sum_ranges], ids=["forward", "sum_ranges"])
def test_rows_are_read_16_bytes_at_a_time(kernel: Any, tmp_path: Path) -> None:
    """A thread's read of one number at a time takes four times the instructions: addresses must be known as aligned."""
    ptx = compiled(case(kernel, 64, ""), 90).asm["ptx"]
    # Two partitions, or a partition and the gradient, of a tile of two reads per thread each.
    assert len(re.findall(r"ld\.global\S*\.v4\.(?:b32|f32)\b", ptx)) >= 4
    assert "0 bytes spill stores, 0 bytes spill loads" in spills(ptx, 90, tmp_path)[0]


def test_cases_cover_every_kernel() -> None:
    of_modules = (forward, occurrences, sums, long_rows, steps, replicas, sent_ids)
    modules_of_launches = (launches, backward_launches, replica_launches, id_launches)
    text = "".join(Path(str(module.__file__)).read_text() for module in modules_of_launches)
    launched = set(re.findall(r"launch\(\s*(\w+),", text))
    assert launched == {case.kernel.fn.__name__ for case in cases(64)}
    assert all(any(name in vars(module) for module in of_modules) for name in launched)
