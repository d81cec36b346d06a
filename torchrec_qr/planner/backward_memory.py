"""Bytes that the backward of a lookup takes on a GPU, beside its output and the output's gradient."""

import math

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.distributed.layout import stored_columns

# As `torchrec_qr.ops.triton_kernels.backward_launches` allocates them.
_IDS_PER_RANGE, _WAITING_BYTES, _SORTED_BYTES = 32, 12, 50


def backward_bytes(config: CompositionalConfig, ids: float, start: int, stop: int) -> int:
    """Returns the bytes on a GPU that the backward of columns [start, stop) of a table takes for itself.

    Of N ids, with D_j columns of partition j, they are

        50 · N  +  2 · N / 32 · 4 · max_j D_j  +  Σ_{j waits} min(N, |P_j|) · (4 · D_j + 12)

    bytes. The first are keys, order and places of ids, while they are sorted. The second are sums of rows whose ids lie
    in several ranges of 32. The last are sums of rows that wait for their step: under ``mult``, of all partitions but
    the main one, because the gradient of that reads their rows.

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
    total = _SORTED_BYTES * ids + 2 * ids / _IDS_PER_RANGE * 4 * max(widths)
    for j, size in enumerate(partitions.sizes):
        if config.operation == "mult" and j != partitions.main:
            total += min(ids, size) * (4 * widths[j] + _WAITING_BYTES)
    return math.ceil(total)
