"""Bytes that the backward of a lookup takes on a GPU, beside its output and the output's gradient."""

import math

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.distributed.layout import stored_columns

# As `torchrec_qr.ops.triton_kernels.launches` allocates them.
_IDS_PER_CHUNK, _ROW_BYTES, _SORTED_BYTES = 32, 16, 50


def backward_bytes(config: CompositionalConfig, ids: float, start: int, stop: int) -> int:
    """Returns the bytes on a GPU that the backward of columns [start, stop) of a table takes for itself.

    The kernels sum the gradients of N ids per row before any row is stepped, in buffers of

        Σ_j (min(N, |P_j|) + N / 32) · (4 · D_j + 16)  +  50 · N

    bytes: a row of sums with its number, weight and entry for each row and for each chunk of 32 ids, then keys, order
    and bags of the ids while they are sorted. Partitions of one number are summed together over all tables of a lookup.
    N rows are counted for the main partition, because the rows of other tables leave room for them.

    Example:
        >>> from torchrec_qr import CompositionalEmbeddingBagConfig, QuotientRemainder
        >>> config = CompositionalEmbeddingBagConfig(
        ...     name="t", feature_names=["f"], num_embeddings=4000, embedding_dim=4,
        ...     partitions=QuotientRemainder(num_collisions=4))
        >>> backward_bytes(config, 3200, 0, 4)  # 3,300 rows of the main partition, 104 of the other
        268928
    """
    total = _SORTED_BYTES * ids
    for j, size in enumerate(config.bound_partitions.sizes):
        a, b = stored_columns(config, j, start, stop)
        if a == b:
            continue
        rows = ids if j == config.bound_partitions.main else min(ids, size)
        total += (rows + ids / _IDS_PER_CHUNK) * (4 * (b - a) + _ROW_BYTES)
    return math.ceil(total)
