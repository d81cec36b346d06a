"""CUDA graphs replay addresses and numbers of the captured step, so that lookups stay outside of them."""

import pytest
import torch

from torchrec_qr.ops import operators

OPERATORS = ("lookup", "lookup_gradients")


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_tagged(name: str) -> None:
    """``torch.compile(mode="reduce-overhead")`` cuts its graphs at operators with this tag."""
    assert operators.lookup_op is not None  # registers both
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.torchrec_qr, name).default.tags


def test_a_capture_by_hand_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("torchrec_qr.ops.backends.triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    triton._refuse_capture(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        triton._refuse_capture(torch.device("cuda", 0))
