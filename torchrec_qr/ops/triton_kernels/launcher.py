"""Launches of kernels without what Triton does anew at each: binding and specialising two dozen arguments."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Tensors that a caller gives, which may begin anywhere. The others are made here, where PyTorch aligns them.
_FROM_CALLERS = ("ids", "offsets", "id_weights", "rows", "gradients_of_replicas", "looked_up")


def kernel(numbers: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a kernel of a function, with one compiled form per types of arguments and constants, whatever their values.

    Triton compiles a kernel anew where an address stops being a multiple of 16, or a number becomes 1.

    Args:
        numbers: the names of its arguments that are integers.
    """

    def of(function: Callable[..., Any]) -> Any:
        anywhere = [name for name in _FROM_CALLERS if name in inspect.signature(function).parameters]
        return triton.jit(do_not_specialize=numbers.split(), do_not_specialize_on_alignment=anywhere)(function)

    return of


class _Form(NamedTuple):
    """What one compiled form of a kernel is for. ``types``: of its arguments, None of what is no tensor."""

    kernel: Any
    device: int
    types: tuple[torch.dtype | None, ...]
    constants: tuple[Any, ...]
    num_warps: int


_compiled: dict[_Form, Any] = {}


def launch(
    kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...], num_warps: int
) -> None:
    """Launches ``kernel`` on the current device and stream; ``grid`` may hold zeros, which launch nothing.

    Args:
        arguments: tensors, None, and integers below 2^31, in the kernel's order.
        constants: the values of the parameters after them, which are constants of the compiled form.
    """
    if not (grid[0] and grid[1]):
        return
    on_gpu = arguments[0].device.type == "cuda"
    types = tuple(a.dtype if isinstance(a, Tensor) else None for a in arguments)
    form = _Form(kernel, torch.cuda.current_device() if on_gpu else -1, types, constants, num_warps)
    found = _compiled.get(form)
    if found is None:
        found = kernel[(*grid, 1)](*arguments, *constants, num_warps=num_warps)
        if found is not None:  # an interpreter has no compiled form
            _compiled[form] = found
    else:
        found[(*grid, 1)](*arguments, *constants)
