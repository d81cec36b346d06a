"""How near a result must be to a reference in float64."""

import torch
from torch import Tensor


def assert_near(actual: Tensor, expected: Tensor, rtol: float, what: str = "values") -> None:
    """Asserts that each value is within ``rtol`` of its own size plus that of the largest value expected."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double().cpu(),
        expected.double(),
        rtol=rtol,
        atol=rtol * scale + 1e-12,
        msg=lambda message: f"{what}: {message}",
    )
