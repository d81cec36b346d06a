"""Large outputs of served lookups take memory that earlier ones gave back, and never that of a tensor in use."""

import pytest
import torch

from tests.ops.test_served_operators import Case, S
from torchrec_qr import QuotientRemainder
from torchrec_qr.ops.serving_library import load_operators
from torchrec_qr.ops.serving_reference import composed_by_torch

pytestmark = pytest.mark.skipif(not load_operators(), reason="the operators' library was not built")


def test_large_outputs_take_the_memory_of_those_that_were_freed() -> None:
    case = Case([(QuotientRemainder(num_collisions=4), "mult", 64, 1, "error", False, "int8")], 0, False)
    ids = torch.randint(0, S, (3000,))
    arguments = (case.weights, [], case.layout, case.names, ids, 64)
    expected = composed_by_torch(*arguments)
    whole = torch.ops.torchrec_qr_serving.composed(*arguments)
    view, address = whole[10:], whole.data_ptr()
    del whole
    other = torch.ops.torchrec_qr_serving.composed(*arguments)
    assert other.data_ptr() != address
    other.fill_(torch.nan)
    torch.testing.assert_close(view, expected[10:], rtol=1e-5, atol=1e-5)
    del view, other
    again = [torch.ops.torchrec_qr_serving.composed(*arguments) for _ in range(12)]
    assert address in [a.data_ptr() for a in again]
    assert len({a.data_ptr() for a in again}) == len(again)
    for out in again:
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.device == torch.device("cpu")
