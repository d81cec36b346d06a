"""The CUDA path on fake tensors: devices are not mixed up, the host reads no device memory, and no step gets dearer."""

from typing import Any

import pytest
import step_costs
from device_cases import REFERENCE, REFUSED, cases

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.timeout(300)

CASES = [case.id for case in cases()]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """All cases in one process, because its torch is loaded after a library that stands in for CUDA."""
    return step_costs.run_program("run_device_cases.py")


@pytest.fixture(scope="module")
def measured(results: dict[str, Any]) -> dict[str, Any]:
    return step_costs.measured(results, {case.id for case in REFERENCE})


@pytest.mark.parametrize("case", CASES)
def test_a_step_stays_on_its_device(results: dict[str, Any], case: str) -> None:
    """From input dist to output dist and back, twice, with the optimizer's step, launched where the tensors lie."""
    assert "error" not in results[case], results[case]["error"]


@pytest.mark.parametrize("case", CASES)
def test_a_step_costs_what_the_table_says(measured: dict[str, Any], case: str) -> None:
    """Host synchronisations, blocking copies, launches and collectives, by the function that they occur in."""
    if case not in measured:
        pytest.fail("the step fails, and has no costs")
    step_costs.check(case, measured[case])


@pytest.mark.parametrize(("call", "message"), REFUSED.items())
def test_tensors_on_several_devices_are_refused_by_name(results: dict[str, Any], call: str, message: str) -> None:
    assert message in str(results[call]["error"])
