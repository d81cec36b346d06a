"""The GPU memory that the backward of a lookup takes besides the output and its gradient."""

import math

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.distributed.layout import stored_columns

# `torchrec_qr.ops.triton_kernels.backward_launches` allocates these.
IDS_PER_RANGE, WAITING_BYTES, _SORTED_BYTES = 32, 12, 50


def backward_bytes(config: CompositionalConfig, ids: float, start: int, stop: int) -> int:
    """Returns the bytes on a GPU that the backward of columns [start, stop) of a table allocates.

    For N ids, with D_j columns of partition j, there are

        50 · N  +  2 · N / 32 · 4 · max_j D_j  +  Σ_{j waits} min(N, |P_j|) · (4 · D_j + 12)

    bytes. The first term counts the keys, order and places of ids, which the kernels sort. The second term counts the
    sums of rows whose ids are in several ranges of 32. The third term counts the sums of rows that wait for their step.
    Under ``mult`` all partitions except the main one wait, because the gradient of the main one reads their rows.

    Args:
        config (CompositionalConfig): the table.
        ids (float): N, the ids that the rank looks up in a step.
        start (int): the first column.
        stop (int): the end of the columns.

    Example:
        >>> from torchrec_qr import CompositionalEmbeddingBagConfig, QuotientRemainder
        >>> config = CompositionalEmbeddingBagConfig(
        ...     name="t", feature_names=["f"], num_embeddings=4000, embedding_dim=4,
        ...     partitions=QuotientRemainder(num_collisions=4))
        >>> backward_bytes(config, 3200, 0, 4)  # 4 rows of the other partition wait
        163312
    """
    partitions = config.bound_partitions
    spans = [stored_columns(config, j, start, stop) for j in range(len(partitions.sizes))]
    widths = [b - a for a, b in spans]
    total = _SORTED_BYTES * ids + 2 * ids / IDS_PER_RANGE * 4 * max(widths)
    for j, size in enumerate(partitions.sizes):
        if config.operation == "mult" and j != partitions.main:
            total += min(ids, size) * (4 * widths[j] + WAITING_BYTES)
    return math.ceil(total)
