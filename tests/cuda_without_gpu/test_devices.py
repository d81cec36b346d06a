"""The CUDA path on fake tensors: devices are not mixed up, the host reads no device memory, and no step gets dearer."""

from shutil import which
from typing import Any

import noop_cuda
import pytest
import step_costs
from device_cases import REFERENCE, REFUSED, SEEN, UNSHARDED, DeviceCase, cases

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(which(noop_cuda.COMPILER) is None, reason="no C++ compiler"),
]

# The table of costs names the launches of these one by one.
QUICK = [case.id for case in REFERENCE]
CASES = [case.id if case.id in QUICK else pytest.param(case.id, marks=pytest.mark.slow) for case in cases()]


@pytest.fixture(scope="module")
def results(selected: set[Any]) -> dict[str, Any]:
    """The selected cases in processes of their own, whose torch is loaded after a library that stands in for CUDA."""
    return step_costs.run_device_cases(*selected)


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


# All tables that kernels have are looked up at once: where their rows are alike, by one kernel.
FORWARD_KERNELS = 1
# Blocks of tables; for each of two partitions ranges, long rows and sums of sums; keys of the one that is sorted; and
# the rows of the other that waited, whose gradients are written at the end.
BACKWARD_KERNELS = 9
# The failure word, and without pooling the output, are filled. The gradients of tables are filled at once. One launch
# joins or copies the gradient of the output. Sums that wait are filled, and keys are sorted by three launches at most.
FILLS_AND_SORTS = 7
OF_TWO_AND_26_TABLES = [
    pytest.param(*(DeviceCase(UNSHARDED, pooled, tables=n).id for n in (2, 26)), id="bags" if pooled else "sequences")
    for pooled in (True, False)
]


@pytest.mark.parametrize(("of_two", "of_26"), OF_TWO_AND_26_TABLES)
def test_an_unsharded_collection_launches_the_same_for_any_number_of_tables(
    results: dict[str, Any], of_two: str, of_26: str
) -> None:
    few, many = (results[case]["costs"] for case in (of_two, of_26))
    launches = many["torchrec_qr"]["launches"]
    assert few["torchrec_qr"]["launches"] == launches
    assert not set(step_costs.WAITS) & set(many["torchrec_qr"])
    kernels = {place.split()[-1]: n for place, n in launches.items() if not place.endswith(" aten")}
    assert kernels.pop("forward") == FORWARD_KERNELS
    assert sum(kernels.values()) == BACKWARD_KERNELS
    assert sum(launches.values()) <= FORWARD_KERNELS + BACKWARD_KERNELS + FILLS_AND_SORTS
    if "bags" in of_26:
        # Nor does TorchRec wait, because sums need no numbers of ids on the host.
        assert not set(step_costs.WAITS) & set(many["torchrec"])


@pytest.mark.parametrize(("call", "message"), REFUSED.items())
def test_tensors_on_several_devices_are_refused_by_name(results: dict[str, Any], call: str, message: str) -> None:
    assert message in str(results[call]["error"])


@pytest.mark.parametrize(("fault", "what"), SEEN.items())
def test_the_recorder_sees(results: dict[str, Any], fault: str, what: str) -> None:
    """Each fault by itself, so that an empty table means that there is none."""
    seen = results[fault]["seen"]
    assert what in seen if "Traceback" in seen else seen == what


def test_more_and_less_than_the_table_are_told() -> None:
    before = {"torchrec_qr, launches, a": 2, "torchrec_qr, launches, b": 1, "torchrec, launches, in all": 9}
    now = {"torchrec_qr, launches, a": 3, "torchrec_qr, launches, c": 1, "torchrec, launches, in all": 10}
    more, less = step_costs.differences(before, now, own_only=True)
    assert more == [
        "torchrec_qr, launches, a: 3; allowed: at most 2",
        "torchrec_qr, launches, c: 1; allowed: at most 0",
    ]
    assert less == ["torchrec_qr, launches, b: 0; in the table: 1"]
    assert (
        step_costs.differences(before, now, own_only=False)[0][0]
        == "torchrec, launches, in all: 10; allowed: at most 9"
    )
