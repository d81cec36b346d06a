"""Compiles what a lookup needs on a GPU before it is needed: a rank that compiles keeps all others waiting."""

import torch
from torch import Tensor

from torchrec_qr.ops.arguments import Batch, Outcome
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.dispatch import kernels_on, kernels_take

_BAGS = 16
# So many ids of one row that sums of sums are needed, which have kernels of their own.
_IDS = 2_081


def warm_up(tables: Description, weights: list[Tensor], outcomes: list[Outcome], pooled: bool, weighted: bool) -> None:
    """Launches every kernel of a lookup and of its step once, and changes nothing; there is nothing to do on a CPU.

    Args:
        tables, weights: as `torchrec_qr.ops.lookup.look_up` has them.
        outcomes: rules and states as they will be; the numbers do not matter.
        pooled, weighted: as they will be.

    Example:
        >>> warm_up(Description([], []), [torch.ones(2, 4)], [], pooled=True, weighted=False)
    """
    if weights and weights[0].device.type == "cuda" and kernels_take(tables, weights):
        kernels_on(weights[0].device)
        launch_every_kernel(tables, weights, outcomes, pooled, weighted)


def launch_every_kernel(
    tables: Description, weights: list[Tensor], outcomes: list[Outcome], pooled: bool, weighted: bool
) -> None:
    """`warm_up` of tables on any device, such as the CPU of Triton's interpreter."""
    # Here, because it imports Triton, which may be missing.
    from torchrec_qr.ops.backends import triton

    device, groups = weights[0].device, tables.num_features * (_BAGS if pooled else 1)
    # Lengths of a batch that is not pooled lie on the host, as in a step.
    offsets = torch.linspace(0, _IDS, groups + 1, dtype=torch.int64, device=device if pooled else "cpu")
    batch = Batch(
        ids=torch.zeros(_IDS, dtype=torch.int64, device=device),
        offsets=offsets,
        weights=torch.zeros(_IDS, device=device) if weighted else None,
        pooled=pooled,
    )
    triton.launch_every_kernel(tables, weights, batch, outcomes)
