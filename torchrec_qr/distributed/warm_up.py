"""Compiling what a sharded model needs on a GPU before its first collective."""

from torch import nn

from torchrec_qr.distributed.embedding import ShardedCompositionalEmbeddingCollection
from torchrec_qr.distributed.embeddingbag import ShardedCompositionalEmbeddingBagCollection
from torchrec_qr.distributed.lookup_kernel import own_lookup


def warm_up(model: nn.Module) -> None:
    """Has Triton compile the lookups of a sharded model and their steps; nothing else changes.

    Otherwise the first step compiles, on each rank as long as its own tables take, while the ranks that have finished
    spin in a collective. On a CPU there is nothing to compile. Kernels of PyTorch and FBGEMM come compiled.

    Args:
        model: as ``DistributedModelParallel`` has made it.

    Example:
        >>> import torch
        >>> from torchrec_qr.distributed.warm_up import warm_up
        >>> warm_up(torch.nn.Linear(2, 2))  # without sharded tables there is nothing to do either
    """
    for module in model.modules():
        if isinstance(module, ShardedCompositionalEmbeddingBagCollection | ShardedCompositionalEmbeddingCollection):
            # A list, not modules of it.
            for lookup in module._lookups:
                own_lookup(lookup).warm_up()
