"""All instruction sets of the kernel of served models give the same bits, chosen as those of training are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.test_served_operators import SPECS, Case
from torchrec_qr.ops.cpu_library import ISAS, VARIABLE
from torchrec_qr.ops.served_operators import ROW_TYPES
from torchrec_qr.ops.serving_library import load_operators, operators_library

pytestmark = pytest.mark.skipif(not load_operators(), reason="the operators' library was not built")
# Imports torch and the library alone, as a process that serves does.
PROGRAM = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
calls = torch.load(sys.argv[2])
torch.save([torch.ops.torchrec_qr_serving.pooled(*call) for call in calls], sys.argv[3])
"""


def run(folder: Path, choice: str) -> subprocess.CompletedProcess[str]:
    paths = [str(operators_library()), str(folder / "calls"), str(folder / choice)]
    environment = {**os.environ, VARIABLE: choice}
    command = [sys.executable, "-c", PROGRAM, *paths]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_all_instruction_sets_give_the_same_bits(tmp_path: Path) -> None:
    # 62 = 3 · 16 + 8 + 4 + 2: columns for each width of vectors, and some for none. FBGEMM has no such rows of int4.
    calls = [
        Case(
            [
                (spec, operation, dim, 1, "error", number % 2 == 0, row_type)
                for number, (spec, operation) in enumerate(SPECS.values())
            ],
            seed=dim,
            policy_ids=False,
        ).arguments(weighted)
        for row_type in ROW_TYPES
        for dim, weighted in [(16, False), (64, True), (60 if row_type == "int4" else 62, True)]
    ]
    torch.save(calls, tmp_path / "calls")
    for isa in ISAS:
        done = run(tmp_path, isa)
        assert done.returncode == 0, done.stderr
    expected = [torch.ops.torchrec_qr_serving.pooled(*call) for call in calls]
    for isa in ISAS:
        for out, here in zip(torch.load(tmp_path / isa), expected, strict=True):
            assert torch.equal(out.view(torch.int32), here.view(torch.int32)), isa


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["sse9", "off"])
def test_a_choice_that_the_library_does_not_have_is_refused(tmp_path: Path, choice: str) -> None:
    case = Case([(*SPECS["qr_mult"], 16, 1, "error", False, "int8")], 0, False)
    torch.save([case.arguments(False)], tmp_path / "calls")
    done = run(tmp_path, choice)
    assert done.returncode != 0
    assert f"environment variable {VARIABLE}='{choice}'; allowed in a process" in done.stderr
