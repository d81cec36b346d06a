"""The compilation of a sharded model's kernels on a GPU, before its first collective."""

from torch import nn

from torchrec_qr.distributed.embedding import ShardedCompositionalEmbeddingCollection
from torchrec_qr.distributed.embeddingbag import ShardedCompositionalEmbeddingBagCollection
from torchrec_qr.distributed.lookup_kernel import own_lookup


def warm_up(model: nn.Module) -> None:
    """Compiles the Triton kernels of the lookups of a sharded model and of their steps.

    Otherwise the first step compiles them, and ranks with fewer kernels wait for the others in a collective. On a CPU
    there is nothing to compile. Nothing else changes.

    Args:
        model (nn.Module): a ``DistributedModelParallel``.

    Example:
        >>> import torch
        >>> from torchrec_qr.distributed.warm_up import warm_up
        >>> warm_up(torch.nn.Linear(2, 2))  # there are no sharded tables
    """
    for module in model.modules():
        if isinstance(module, ShardedCompositionalEmbeddingBagCollection | ShardedCompositionalEmbeddingCollection):
            # `modules` does not yield these, because TorchRec keeps them in a list.
            for lookup in module._lookups:
                own_lookup(lookup).warm_up()
