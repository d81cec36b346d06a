"""What PyTorch's own functions go through and the kernels do not: transforms, forward-mode derivatives and tracers."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

try:
    _transforms_are_active = torch._C._are_functorch_transforms_active
    _num_dispatch_modes = torch._C._len_torch_dispatch_stack
    _ = forward_ad._current_level
except AttributeError as error:
    raise ImportError(
        f"this version of torch has no {error.name}, by which torchrec_qr finds out if a lookup is transformed"
    ) from error


def is_transformed() -> bool:
    """Returns whether ``torch.func.grad``, ``vmap`` and the like, or ``forward_ad.dual_level``, are in force.

    Example:
        >>> is_transformed()
        False
        >>> torch.func.vmap(lambda x: x + is_transformed())(torch.zeros(2)).tolist()
        [1.0, 1.0]
    """
    return _transforms_are_active() or forward_ad._current_level >= 0


def is_traced(*tensors: Tensor) -> bool:
    """Returns whether a compiler, a mode such as ``FakeTensorMode``, or a subclass of tensors is to see operators.

    Example:
        >>> is_traced(torch.ones(2))
        False
        >>> with torch._subclasses.FakeTensorMode():
        ...     is_traced(torch.ones(2))
        True
    """
    if torch.compiler.is_compiling() or _num_dispatch_modes():
        return True
    return any(type(t) not in (Tensor, nn.Parameter) for t in tensors)
