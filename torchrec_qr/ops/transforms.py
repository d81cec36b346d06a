"""Function transforms and forward-mode derivatives, which PyTorch's own functions know and the kernels do not."""

import torch
from torch.autograd import forward_ad

try:
    _transforms_are_active = torch._C._are_functorch_transforms_active
    _ = forward_ad._current_level
except AttributeError as error:
    raise ImportError(
        f"this version of torch has no {error.name}, by which torchrec_qr tells whether a lookup is transformed"
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
