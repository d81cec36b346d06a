"""The structs of ``csrc/lookup.h`` as numpy arrays, and how tensors and descriptions are written into them."""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from torchrec_qr.ops.description import KERNEL_OPERATIONS, Description
from torchrec_qr.ops.update_rules import NUMBERS

_POINTER, _INT64, _INT32, _FLOAT = np.uintp, np.int64, np.int32, np.float32
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3, torch.int64: 4}
MAX_STATES = 3  # as csrc/lookup.h has it


def _struct(*fields: tuple[Any, ...]) -> np.dtype[np.void]:
    return np.dtype(list(fields), align=True)


PARTITION = _struct(
    ("weight", _POINTER),
    *((name, _INT64) for name in ("rows", "width", "row_stride", "divisor", "modulus")),
    ("class_map", _POINTER),
    ("first_row", _INT64),
    ("weight_type", _INT32),
    ("class_map_type", _INT32),
    ("gradient", _POINTER),
    ("touched", _POINTER),
    ("state", _POINTER, (MAX_STATES,)),
    ("rule", _INT32),
    ("numbers", _FLOAT, (len(NUMBERS),)),
)
TABLE = _struct(
    *((name, _INT32) for name in ("operation", "first_partition", "num_partitions")),
    *((name, _INT32) for name in ("first_feature", "num_features")),
    *((name, _INT64) for name in ("dim", "column", "num_ids")),
    *((name, _INT64) for name in ("codes_per_row", "code_stride", "code_size", "code_first_row", "hash_seed")),
)
GROUP = _struct(
    *((name, _POINTER) for name in ("tables", "partitions", "ids", "offsets", "id_weights", "out", "out_gradient")),
    ("id_weights_gradient", _POINTER),
    *((name, _INT64) for name in ("num_tables", "num_features", "num_ids", "num_bags", "out_stride")),
    *((name, _INT32) for name in ("id_type", "offset_type", "pooled", "threads", "isa")),
)
FAILURE = _struct(
    *((name, _INT32) for name in ("code", "table", "partition", "reserved")), ("position", _INT64), ("value", _INT64)
)
STRUCTS = (PARTITION, TABLE, GROUP, FAILURE)


class Structs:
    """The structs that follow from a description alone."""

    def __init__(self, description: Description) -> None:
        tables = description.tables
        self.tables = np.zeros(len(tables), TABLE)
        self._partitions = np.zeros(len(description.partitions), PARTITION)
        # Where the class map of each partition with one begins: (partition, number of the map, row of the map).
        self._maps: list[tuple[int, int, int]] = []
        partition = feature = column = num_maps = 0
        for i, t in enumerate(tables):
            code = t.code or (0, 0, 0, 0)
            seed = -1 if t.hash_seed is None else t.hash_seed
            self.tables[i] = (
                *(KERNEL_OPERATIONS.index(t.operation), partition, len(t.partitions), feature, t.num_features),
                *(t.dim, column, t.num_ids, *code, seed),
            )
            for p in t.partitions:
                row = self._partitions[partition]
                row["width"], row["divisor"], row["modulus"], row["first_row"] = p[:4]
                if t.has_map:
                    self._maps.append((partition, num_maps, p.map_row))
                partition += 1
            num_maps += t.has_map
            feature += t.num_features
            column += t.num_features * t.dim

    def partitions_with(self, weights: list[Tensor], class_maps: list[Tensor]) -> np.ndarray[Any, Any]:
        """Returns the partitions with the addresses of weights and class maps."""
        out = self._partitions.copy()
        out["weight"] = [w.data_ptr() for w in weights]
        out["rows"] = [w.shape[0] for w in weights]
        # A row apart, also of one row, or none, whose stride means nothing.
        out["row_stride"] = [max(w.stride(0), w.shape[1]) for w in weights]
        out["weight_type"] = [TYPES[w.dtype] for w in weights]
        for partition, number, row in self._maps:
            class_map = class_maps[number]
            out["class_map"][partition] = class_map.data_ptr() + row * class_map.stride(0) * class_map.element_size()
            out["class_map_type"][partition] = TYPES[class_map.dtype]
        return out


_structs: WeakKeyDictionary[Description, Structs] = WeakKeyDictionary()


def structs_of(description: Description) -> Structs:
    """Returns the structs of a description, which are made once."""
    found = _structs.get(description)
    if found is None:
        found = _structs[description] = Structs(description)
    return found
