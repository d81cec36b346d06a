"""The suites of the step benchmark, by name: each a list of cells, of the size that a rank's memory has room for."""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence

from benchmarks.step_cells import Cell, Tables, Traffic

# MLPerf's DLRM-DCNv2 has these rows of each table, and these ids a bag. `configs/mlperf_dcnv2_qr.yaml` has the same,
# and compresses as the suite does: 4 ids share a row, in tables of more than 10,000.
# fmt: off
MLPERF_ROWS = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938,
    155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)
MLPERF_IDS_PER_BAG = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
# fmt: on
_ALONE = ("tbe", "fused_alone")
_SHARE = 0.4  # of a rank's memory that full tables may take
_SHARDINGS = ("table_wise", "column_wise", "data_parallel")
_OPTIMIZERS = ("sgd", "rowwise_adagrad")


def cells_of(options: argparse.Namespace, memory_gib: float, world_size: int, on_cpu: bool) -> list[Cell]:
    """Returns the cells of ``options.suite``.

    Args:
        options: of the command line, None where not given.
        memory_gib: of a rank.
        world_size: number of ranks.
        on_cpu: whether ranks run on a CPU.
    """
    room = _SHARE * memory_gib if options.max_gib is None else options.max_gib
    cells = SUITES[options.suite](options, int(room * 2**30), world_size, on_cpu)
    chosen = []
    for cell in cells:
        # The fallback is that of the CPU's kernels.
        variants = [v for v in cell.variants if on_cpu or v != "fallback"]
        if options.variants:
            variants = [v for v in variants if v in options.variants]
        chosen.append(Cell(cell.tables, cell.ms, cell.traffics, tuple(variants)))
    return [cell for cell in chosen if cell.variants]


def largest_rows(room: int, sizes: Sequence[int], bytes_per_row: int) -> int:
    """Returns the most rows a table may have for all, cut to that, to fit.

    Example:
        >>> largest_rows(100, [3, 50, 7], bytes_per_row=2)
        40
    """
    left = room // bytes_per_row
    for i, size in enumerate(sorted(sizes)):
        equal = left // (len(sizes) - i)
        if size > equal:
            return max(equal, 1)
        left -= size
    return max(sizes)


def headline(options: argparse.Namespace, room: int, world_size: int, on_cpu: bool) -> list[Cell]:
    """All ways to have quotient-remainder tables, table-wise; ``--quick``: ours against full ones."""
    optimizers = _OPTIMIZERS[:1] if options.quick else _OPTIMIZERS
    cells = []
    for dim, num_ids, optimizer in itertools.product(options.dims or [64], options.num_ids or [200_000], optimizers):
        variants = ["full", "fused"]
        if not options.quick:
            # torch has no rowwise Adagrad for sparse gradients.
            bag = ["dlrm_bag"] if optimizer == "sgd" else []
            variants = ["full", "stock_pooled", "stock_unpooled", *bag, "fused_alone", "fused", "fallback"]
        cells.append(_equal(options, num_ids, dim, 26, "table_wise", optimizer, variants))
    return cells


def grid(options: argparse.Namespace, room: int, world_size: int, on_cpu: bool) -> list[Cell]:
    """All shardings, optimizers and widths, with as many features of the largest tables as fit."""
    cells = []
    for dim, num_ids in itertools.product(options.dims or [16, 64, 128], options.num_ids or [200_000, 10_000_000]):
        fitting = room * world_size // (num_ids * dim * 4)
        features = 26 if fitting >= 26 else min(4, fitting // 2 * 2)
        if features:
            cells += [
                _equal(options, num_ids, dim, features, sharding, optimizer, ["full", "fused"])
                for sharding in options.shardings or _SHARDINGS
                for optimizer in _OPTIMIZERS
            ]
    return cells


def hosts(options: argparse.Namespace, room: int, world_size: int, on_cpu: bool) -> list[Cell]:
    """Table-wise, and data-parallel against full tables table-wise: where bytes decide."""
    cells = []
    for optimizer in _OPTIMIZERS:
        cells.append(_equal(options, 200_000, 64, 26, "table_wise", optimizer, ["full", "fused"]))
        # With 4 ids a row the gradients alone are 333 MB.
        few_rows = (math.isqrt(200_000),)
        cells.append(_equal(options, 200_000, 64, 26, "data_parallel", optimizer, ["full", "fused"], few_rows))
    return cells


def nodes(options: argparse.Namespace, room: int, world_size: int, on_cpu: bool) -> list[Cell]:
    """Tables with 4 ids a row on two nodes: table-wise over all ranks, a copy per node, and a copy per rank.

    Bags of small batches have one id and ten, and those of large batches one. Ids are skewed by default.
    """
    tables = Tables((200_000,) * 4, 64, "sgd", "table_wise")
    exponent = 1.05 if options.zipf is None else options.zipf
    sizes = [(options.bags, 1), (options.bags, 10)] if options.bags else [(2048, 1), (2048, 10), (16384, 1)]
    traffics = tuple(Traffic(bags, (hot,) * 4, exponent) for bags, hot in sizes)
    return [Cell(tables, (4,), traffics, ("full", "fused", "copy_per_node", "copy_per_rank"))]


def dlrm(options: argparse.Namespace, room: int, world_size: int, on_cpu: bool) -> list[Cell]:
    """MLPerf's tables, full and compressed, by the plans of TorchRec's planner and of this project's."""
    most = options.max_rows or largest_rows(room * world_size // 2, MLPERF_ROWS, 128 * 4)
    sizes = tuple(min(n, most) for n in MLPERF_ROWS)
    tables = Tables(sizes, 128, "sgd", threshold=10_000)
    traffic = Traffic(options.bags or 2048, MLPERF_IDS_PER_BAG, 1.05 if options.zipf is None else options.zipf)
    return [Cell(tables, (4,), (traffic,), ("full", "full_our_planner", "fused", "fused_our_planner"))]


def dynamicemb(options: argparse.Namespace, room: int, world_size: int, on_cpu: bool) -> list[Cell]:
    """The configuration of NVIDIA's dynamicemb benchmark: 10 tables, one-hot ids by Zipf's law of exponent 1.05.

    On one rank FBGEMM's and this project's lookups without TorchRec are measured as well.
    """
    scale = options.scale or (0.01 if on_cpu else 1.0)
    num_ids, bags = max(1, round(1_677_721 * scale)), options.bags or max(1, round(104_857 * scale))
    tables = Tables((num_ids,) * 10, 128, "sgd", sharding="table_wise" if world_size <= 10 else "column_wise")
    traffic = Traffic(bags, (1,) * 10, 1.05 if options.zipf is None else options.zipf)
    variants = ("full", "fused", *(_ALONE if world_size == 1 else ()))
    return [Cell(tables, _collisions(num_ids), (traffic,), variants)]


def tbe(options: argparse.Namespace, room: int, world_size: int, on_cpu: bool) -> list[Cell]:
    """This project's lookup against FBGEMM's of full tables, on one rank, many small tables and few large ones."""
    if world_size > 1:
        raise SystemExit(f"--suite tbe: {world_size} ranks; allowed: 1, because it measures a lookup alone")
    cells = []
    for dim, num_ids in itertools.product(options.dims or [64, 128], options.num_ids or [200_000, 40_000_000]):
        features = min(26, room // (num_ids * dim * 4))
        if features:
            cells.append(_equal(options, num_ids, dim, features, "table_wise", "sgd", list(_ALONE)))
    return cells


Suite = Callable[[argparse.Namespace, int, int, bool], list[Cell]]
SUITES: dict[str, Suite] = {
    "headline": headline,
    "grid": grid,
    "hosts": hosts,
    "nodes": nodes,
    "dlrm": dlrm,
    "dynamicemb": dynamicemb,
    "tbe": tbe,
}


def _collisions(num_ids: int) -> tuple[int, ...]:
    return (4, math.isqrt(num_ids))


def _equal(
    options: argparse.Namespace,
    num_ids: int,
    dim: int,
    features: int,
    sharding: str,
    optimizer: str,
    variants: Sequence[str],
    ms: tuple[int, ...] | None = None,
) -> Cell:
    """Tables of one size, with 1 and with 10 ids a bag."""
    tables = Tables((num_ids,) * features, dim, optimizer, sharding)
    bags, exponent = options.bags or 2048, options.zipf or 0.0
    traffics = tuple(Traffic(bags, (hot,) * features, exponent) for hot in (1, 10))
    return Cell(tables, ms or _collisions(num_ids), traffics, tuple(variants))
