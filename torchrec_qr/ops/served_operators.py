"""The lookup of a served model: two operators that exported programs call, and what they read of the tables.

- ``torchrec_qr_serving::pooled`` pools all features of all tables in one call;
- ``torchrec_qr_serving::composed`` composes the ids of one feature, without pooling.

C++ has both on a CPU: see ``csrc/serving/operators.cpp``. On other devices, and if the library was not built or is
switched off as the kernels of training are, PyTorch takes their place. They have no gradients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_qr.ids import OUT_OF_RANGE_POLICIES
from torchrec_qr.ops.description import KERNEL_OPERATIONS, TableLayout
from torchrec_qr.ops.serving_library import load_operators
from torchrec_qr.ops.serving_reference import composed_by_torch, pooled_by_torch

# As csrc/serving/operators.cpp.
_VERSION = 2
# The types of rows, by their numbers in csrc/lookup.h.
ROW_TYPES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 5, "int4": 6}


class ServedTable(NamedTuple):
    """One table of a served lookup.

    Args:
        name: of the table, for errors.
        features: their names, for errors.
        layout: the table's; not ``path``. Its ``num_features`` is not read.
        num_ids: S.
        out_of_range: the policy for ids outside [0, S), as in `torchrec_qr.ids`.
        mean: whether the pooling is MEAN, which divides by the number of ids of a bag.
        row_types: of each partition, one of ``ROW_TYPES``.
    """

    name: str
    features: tuple[str, ...]
    layout: TableLayout
    num_ids: int
    out_of_range: str
    mean: bool
    row_types: tuple[str, ...]


def served_layout(tables: Sequence[ServedTable]) -> tuple[Tensor, str]:
    """Returns the arguments ``layout`` and ``names`` of the operators.

    Raises:
        NotImplementedError: the operators do not have the operation of a table.

    Example:
        >>> from torchrec_qr.ops.description import PartitionLayout
        >>> qr = TableLayout("mult", (PartitionLayout(8, 1, 25), PartitionLayout(8, 25, 4)), num_ids=100)
        >>> layout, names = served_layout([ServedTable("t", ("f",), qr, 100, "error", False, ("int8", "int8"))])
        >>> layout.tolist(), names
        ([2, 1, 0, 2, 1, 100, 0, 0, 0, -1, 5, 8, 1, 25, 5, 8, 25, 4], 't\\tf')
    """
    numbers = [_VERSION, len(tables)]
    for t in tables:
        operation = "add" if t.layout.operation == "plain" else t.layout.operation
        if operation not in KERNEL_OPERATIONS:
            raise NotImplementedError(
                f"table {t.name!r}: operation {operation!r}; allowed: plain, {', '.join(KERNEL_OPERATIONS)}"
            )
        hashed = t.layout.hash_seed is not None
        any_id = t.out_of_range == "unchecked" and not t.layout.has_map and not hashed
        numbers += [
            KERNEL_OPERATIONS.index(operation),
            len(t.layout.partitions),
            len(t.features),
            -1 if any_id else t.num_ids,
            OUT_OF_RANGE_POLICIES.index(t.out_of_range),
            int(t.layout.has_map),
            int(t.mean),
            t.layout.hash_seed if t.layout.hash_seed is not None else -1,
        ]
        for partition, row_type in zip(t.layout.partitions, t.row_types, strict=True):
            # Rows of a plain table are its ids.
            modulus = t.num_ids if t.layout.operation == "plain" else partition.modulus
            numbers += [ROW_TYPES[row_type], partition.width, partition.divisor, modulus]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu"), "\n".join(
        "\t".join([t.name, *t.features]) for t in tables
    )


_LIBRARY = torch.library.Library("torchrec_qr_serving", "FRAGMENT")
if not load_operators():
    _LIBRARY.define(
        "pooled(Tensor[] weights, Tensor[] class_maps, Tensor layout, str names, Tensor ids, Tensor lengths, "
        "Tensor? id_weights, int[] features, SymInt bags, int columns) -> Tensor"
    )
    _LIBRARY.define(
        "composed(Tensor[] weights, Tensor[] class_maps, Tensor layout, str names, Tensor ids, int columns) -> Tensor"
    )
    _LIBRARY.impl("pooled", pooled_by_torch, "CPU")
    _LIBRARY.impl("composed", composed_by_torch, "CPU")
_LIBRARY.impl("pooled", pooled_by_torch, "CUDA")
_LIBRARY.impl("composed", composed_by_torch, "CUDA")


@torch.library.register_fake("torchrec_qr_serving::pooled")
def _(
    weights: list[Tensor],
    class_maps: list[Tensor],
    layout: Tensor,
    names: str,
    ids: Tensor,
    lengths: Tensor,
    id_weights: Tensor | None,
    features: list[int],
    bags: int,
    columns: int,
) -> Tensor:
    # On the device of the rows: rows on the meta device have no values for ids on a CPU.
    return weights[0].new_empty((bags, columns), dtype=torch.float32)


@torch.library.register_fake("torchrec_qr_serving::composed")
def _(weights: list[Tensor], class_maps: list[Tensor], layout: Tensor, names: str, ids: Tensor, columns: int) -> Tensor:
    return weights[0].new_empty((ids.shape[0], columns), dtype=torch.float32)
