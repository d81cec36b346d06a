"""Buckets of gradients that stay as they are, so that a job that goes on adds gradients up in the same order."""

from torch import nn
from torch.distributed import Reducer
from torch.nn.parallel import DistributedDataParallel

# Use a private method, because DDP has no public way to keep its buckets. It is DDP's own, for ranks that run dry.
if not hasattr(Reducer, "_push_all_rebuilt_params"):
    raise ImportError(f"torch.distributed.Reducer has no _push_all_rebuilt_params, on which {__name__} relies")


def keep_buckets(model: nn.Module) -> None:
    """Settles the buckets of all of a model's ``DistributedDataParallel`` before its first step.

    DDP lays out its buckets anew after the first step of a process, in the order in which gradients came. gloo adds up
    the ranks' values in an order that depends on their place in a bucket. So from three ranks on, the first step after
    a restart differed in the last bits from the same step of a job that had not stopped.

    All ranks must call it, before the first backward.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.reducer._push_all_rebuilt_params()
