"""The bytes that a lookup moves through a rank's memory, for each partition of a table."""

from collections.abc import Sequence
from typing import NamedTuple

from torchrec_qr.distributed.layout import stored_columns
from torchrec_qr.planner.backward_memory import IDS_PER_RANGE, WAITING_BYTES
from torchrec_qr.planner.tables import PlannedTable

_MIN_LOOKUP_COLUMNS = 32  # TorchRec counts rows of fewer columns as so many, if a plan may split columns
_ID_BYTES, _NUMBER_BYTES, _PLACE_BYTES, _ID_WEIGHT_BYTES = 8, 8, 4, 4


class ReadPartition(NamedTuple):
    """The rows of a partition that a rank reads.

    Args:
        rows (int): the rows that it stores.
        columns (int): the columns of the output whose gradient the rows have.
        row_bytes (int): the bytes that it reads per id.
        is_cached (bool): whether its rows fit in the cache of the device, so that no read of them reaches memory.
        waits (bool): whether the sums of its rows wait for their step, because a later launch reads its rows.
    """

    rows: int
    columns: int
    row_bytes: int
    is_cached: bool
    waits: bool


def read_partitions(
    table: PlannedTable, row_blocks: int, start: int, stop: int, *, pad: bool, cache_bytes: float
) -> list[ReadPartition]:
    """Returns the partitions that columns [start, stop) of a table come from.

    The kernels look up one table after the other, so that each table has the cache to itself.

    Args:
        table (PlannedTable): the table.
        row_blocks (int): the blocks into which a plan splits the rows of the base partition.
        start (int): the first column.
        stop (int): the end of the columns.
        pad (bool): whether narrow rows count as 32 columns, as they do in TorchRec's formula.
        cache_bytes (float): the bytes of the device's cache. With 0, rows are in memory.
    """
    config = table.config
    assert config is not None
    main = config.bound_partitions.main
    read = []
    for j, (rows, _, dtype) in enumerate(table.partitions):
        a, b = stored_columns(config, j, start, stop)
        if a == b:
            continue
        stored = -(-rows // row_blocks) if j == config.base_partition else rows
        read.append(
            ReadPartition(
                rows=stored,
                columns=min(b - a, stop - start),
                row_bytes=(max(b - a, _MIN_LOOKUP_COLUMNS) if pad else b - a) * dtype.itemsize,
                is_cached=stored * (b - a) * dtype.itemsize <= cache_bytes,
                waits=config.operation == "mult" and j != main,
            )
        )
    return read


def backward_traffic(read: Sequence[ReadPartition], ids: float, is_weighted: bool, multiplies: bool) -> float:
    """Returns the bytes that a backward on a GPU moves beside what TorchRec counts for partitions in memory.

    Let N ids be looked up. A cached partition with D_j columns, whose keys have s bytes, takes

        N · (4 · D_j  +  4 · D_j · 2 / 32  +  3 · s + 2 · s · (s + 8) + 20)

    bytes. The first term reads a row of the gradient for each id. The second term writes and reads one sum per 32 ids.
    The rest writes the keys and the numbers of ids, sorts them in s passes, and reads them and the places of gradients.
    If all partitions are cached, the kernel that makes keys takes N · 12 more, because it reads ids and writes places.

    The sums of a partition that waits are written and read, which takes 2 · min(N, |P_j|) · (4 · D_j + 12). Under
    ``mult`` each partition reads the keys of all others, and the rows of those in memory.

    Args:
        read (Sequence[ReadPartition]): the partitions.
        ids (float): N.
        is_weighted (bool): whether ids have weights, which take 4 bytes more per id of a cached partition.
        multiplies (bool): whether the operation is ``mult``.

    Example:
        >>> from torchrec_qr.planner.lookup_traffic import ReadPartition, backward_traffic
        >>> four_rows = ReadPartition(rows=4, columns=128, row_bytes=512, is_cached=True, waits=True)
        >>> in_memory = ReadPartition(rows=10**6, columns=128, row_bytes=512, is_cached=False, waits=False)
        >>> backward_traffic([in_memory, four_rows], 1000, is_weighted=False, multiplies=True) / 1000
        1106.192
    """
    cached = [part for part in read if part.is_cached]
    in_memory = [part for part in read if not part.is_cached]
    per_id = sum(4 * part.columns * (1 + 2 / IDS_PER_RANGE) + _key_traffic(part.rows) for part in cached)
    if is_weighted:
        per_id += _ID_WEIGHT_BYTES * len(cached)
    if not in_memory:
        per_id += _ID_BYTES + _PLACE_BYTES
    if multiplies:
        of_others = sum(part.row_bytes for part in in_memory) + sum(_key_bytes(part.rows) for part in read)
        per_id += (len(read) - 1) * of_others
    waiting = sum(min(ids, part.rows) * (4 * part.columns + WAITING_BYTES) for part in read if part.waits)
    return ids * per_id + 2 * waiting


def _key_bytes(rows: int) -> int:
    """Returns the bytes of a key, of which there is one for each row and one for ids without a row."""
    return 1 if rows < 2**8 else 2 if rows < 2**15 else 4


def _key_traffic(rows: int) -> int:
    """Returns the bytes per id to write, sort and read the keys of a partition."""
    size = _key_bytes(rows)
    written = size + _NUMBER_BYTES
    sorting = size + size * 2 * (size + _NUMBER_BYTES)  # a count of digits, then a pass over all for each byte
    return written + sorting + size + _NUMBER_BYTES + _PLACE_BYTES
