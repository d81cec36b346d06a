"""The layouts of a table's partitions, from what maps its ids to rows."""

from collections.abc import Mapping

from torchrec_qr.ops.description import PartitionLayout
from torchrec_qr.partitions import BoundPartitions, ClosedForm


def partition_layouts(
    partitions: BoundPartitions, widths: Mapping[int, int], first_rows: Mapping[int, int] | None = None
) -> tuple[PartitionLayout, ...]:
    """Returns the layouts of those partitions that ``widths`` names, by their widths; in its order.

    Args:
        partitions: which row of each partition an id selects.
        widths: columns per partition.
        first_rows: the first row that is stored, if that is not 0.

    Example:
        >>> from torchrec_qr import QuotientRemainder
        >>> partition_layouts(QuotientRemainder(num_collisions=4).bind(100), {0: 8, 1: 8})[1]
        PartitionLayout(width=8, divisor=25, modulus=4, first_row=0, map_row=0)
    """
    first_rows = first_rows or {}
    if isinstance(partitions, ClosedForm):
        return tuple(
            PartitionLayout(width, partitions.strides[j], partitions.sizes[j], first_rows.get(j, 0))
            for j, width in widths.items()
        )
    return tuple(PartitionLayout(w, first_row=first_rows.get(j, 0), map_row=j) for j, w in widths.items())
