"""Triton's own binder and compiler on what the backend launches, without a GPU: see `dry_launch`."""

import re
from pathlib import Path
from typing import Any

import pytest
import step_costs

pytest.importorskip("triton", reason="Triton is not installed")

import dry_steps

from torchrec_qr.ops.triton_kernels import backward_launches, id_launches, launches, replica_launches

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

BOUND = [name for name, _ in dry_steps.dry_cases() if name.startswith("bound")]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """All cases in one process, whose driver of Triton knows no GPU."""
    return step_costs.run_program("run_dry_launches.py")


@pytest.mark.parametrize("architecture", dry_steps.ARCHITECTURES)
def test_every_kernel_binds_and_compiles(results: dict[str, Any], architecture: int) -> None:
    result = results[f"every kernel for sm_{architecture}"]
    assert "error" not in result, result["error"]
    modules = launches, backward_launches, replica_launches, id_launches
    text = "".join(Path(str(module.__file__)).read_text() for module in modules)
    assert result["launched"] == sorted(set(re.findall(r"launch\(\s*(\w+),", text)))


@pytest.mark.parametrize("case", BOUND)
def test_every_kind_of_step_binds(results: dict[str, Any], case: str) -> None:
    assert "error" not in results[case], results[case]["error"]


@pytest.mark.parametrize("number", dry_steps.NUMBERS)
def test_launches_and_compilations_are_those_of_the_table(results: dict[str, Any], number: int) -> None:
    """Per step, and in the first, the second and later ones, over batches of other sizes and alignments."""
    case = f"{number} tables"
    assert "error" not in results[case], results[case]["error"]
    step_costs.check(case, step_costs.measured(results)[case])


def test_launches_do_not_grow_with_tables(results: dict[str, Any]) -> None:
    few, many = (results[f"{number} tables"]["costs"]["torchrec_qr"]["launches"] for number in dry_steps.NUMBERS)
    assert few == many
