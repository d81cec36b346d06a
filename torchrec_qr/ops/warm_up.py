"""Compiles what a lookup needs on a GPU before it is needed: a rank that compiles keeps all others waiting."""

import torch
from torch import Tensor

from torchrec_qr.ops.arguments import Batch, Gradients
from torchrec_qr.ops.cpu_structs import plan_of
from torchrec_qr.ops.lookup import Lookup, available, gpu_kernels

_BAGS = 16
# So many ids of one row that sums of sums are needed, which have kernels of their own.
_IDS = 2_081


def warm_up(tables: Lookup, weights: list[Tensor], steps: Gradients, pooled: bool, weighted: bool) -> None:
    """Launches every kernel of a lookup and of its step once, and changes nothing; on a CPU there is nothing to do.

    Args:
        tables, weights: as `torchrec_qr.ops.lookup.look_up` has them.
        steps: rules and states as they will be; the numbers do not matter.
        pooled, weighted: as they will be.

    Example:
        >>> from torchrec_qr.ops.arguments import Gradients
        >>> warm_up(Lookup([], [], []), [torch.ones(2, 4)], Gradients([], [], [], []), pooled=True, weighted=False)
    """
    device = weights[0].device if weights else torch.device("cpu")
    if device.type != "cuda" or not available(device):
        return
    launch_every_kernel(tables, weights, steps, pooled, weighted)


def launch_every_kernel(tables: Lookup, weights: list[Tensor], steps: Gradients, pooled: bool, weighted: bool) -> None:
    """`warm_up` of tables on any device, such as the CPU of Triton's interpreter."""
    num_features, device = plan_of(tuple(tables.layout)).num_features, weights[0].device
    groups = num_features * (_BAGS if pooled else 1)
    # Lengths of a batch that is not pooled lie on the host, as in a step.
    offsets = torch.linspace(0, _IDS, groups + 1, dtype=torch.int64, device=device if pooled else "cpu")
    batch = Batch(
        ids=torch.zeros(_IDS, dtype=torch.int64, device=device),
        offsets=offsets,
        weights=torch.zeros(_IDS, device=device) if weighted else None,
        pooled=pooled,
    )
    gpu_kernels().launch_every_kernel(weights, tables.class_maps, batch, tables.layout, "\n".join(tables.names), steps)
