"""Compares tensors by name."""

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_all_close(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    what: str = "",
    rtol: float = 0.0,
    atol: float = 0.0,
    of_half: float | None = None,
) -> None:
    """The names are the same, and the values close: equal by default.

    ``of_half`` is the tolerance of tables that are stored in fp16, where gradients summed in another order may round
    to the next value. Such tables have "half" in their names.
    """
    assert set(actual) == set(expected), f"{what}: {set(actual) ^ set(expected)}"
    for name, value in expected.items():
        of_name = (rtol, atol) if of_half is None or "half" not in name else (of_half, of_half)
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=of_name[0],
            atol=of_name[1],
            check_device=False,
            msg=lambda m, n=name: f"{what}: {n}: {m}",
        )
