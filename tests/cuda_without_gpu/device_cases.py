"""Steps of collections on CUDA, as plain data: every pair of what may vary, and what alone cannot be paired."""

from dataclasses import dataclass, replace
from typing import Any

from pairwise import pairwise

SPLITS_COLUMNS = ("column_wise", "table_column_wise", "grid_shard")
POOLED = ("table_wise", *SPLITS_COLUMNS[:2], "row_wise", "table_row_wise", "grid_shard", "data_parallel")
SEQUENCE = ("table_wise", "column_wise", "row_wise", "data_parallel")
UNSHARDED = "unsharded"


@dataclass(frozen=True)
class DeviceCase:
    """Compositional tables of one sharding type, a plain one beside if ``plain``, and how they are trained.

    ``home``: where the first table is, "here" on this rank or "elsewhere", under the sharding types that choose.
    ``device`` is that of the tables, while the current one is 0.
    """

    sharding: str
    pooled: bool = True
    operation: str = "mult"
    pooling: str = "SUM"
    weighted: bool = False
    out_of_range: str = "error"
    data_type: str = "FP32"
    optimizer: str = "EXACT_ADAGRAD"
    partitions: str = "strided"
    plain: bool = False
    int32: bool = False
    hidden: int | None = None
    index_dedup: bool = False
    home: str = "here"
    device: int = 0
    tables: int = 2

    @property
    def id(self) -> str:
        """Its fields, save those of a bag of an fp32 product of two that is summed and stepped by Adagrad."""
        usual = DeviceCase(self.sharding)
        words = [self.sharding, "bags" if self.pooled else "sequences"]
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name in ("sharding", "pooled") or value == getattr(usual, name):
                continue
            words.append(name if value is True else f"{name}={value}" if isinstance(value, int) else str(value))
        return " ".join(words).replace("EXACT_", "").lower()


_VARIED: dict[str, tuple[Any, ...]] = {
    "pooling": ("SUM", "MEAN"),
    "weighted": (False, True),
    "out_of_range": ("error", "unchecked", "clamp", "wrap"),
    "data_type": ("FP32", "FP16", "BF16"),
    "optimizer": ("EXACT_ADAGRAD", "EXACT_SGD", "EXACT_ROWWISE_ADAGRAD", "ADAM"),
    "partitions": ("strided", "adjacent", "explicit"),
    "plain": (False, True),
    "int32": (False, True),
}
_OPERATIONS = ("mult", "add", "concat", "path")


def _cases(pooled: bool) -> list[DeviceCase]:
    shardings = POOLED if pooled else SEQUENCE
    varied = {n: v for n, v in _VARIED.items() if pooled or n not in ("pooling", "weighted")}
    pairs = pairwise({"sharding": (*shardings, UNSHARDED), "operation": _OPERATIONS, **varied})
    # A path needs all columns of a row: where they are split, a product takes its place, and the path other rows.
    refused = [c for c in pairs if c["operation"] == "path" and c["sharding"] in SPLITS_COLUMNS]
    pairs = [{**c, "operation": "mult"} if c in refused else c for c in pairs]
    pairs += [{**c, "sharding": "row_wise"} for c in refused]
    whole = [s for s in (*shardings, UNSHARDED) if s not in SPLITS_COLUMNS]
    hidden = [{"sharding": s, "operation": "path", "hidden": 3} for s in whole]
    return [DeviceCase(pooled=pooled, **fields) for fields in (*pairs, *hidden)]


# Whose launches the table of costs names one by one.
REFERENCE = [
    *(DeviceCase(sharding) for sharding in (*POOLED, UNSHARDED)),
    *(DeviceCase(sharding, pooled=False) for sharding in (*SEQUENCE, UNSHARDED)),
    DeviceCase("row_wise", optimizer="ADAM"),
    DeviceCase("data_parallel", optimizer="ADAM"),
    DeviceCase("row_wise", partitions="explicit"),
    DeviceCase("table_wise", pooling="MEAN"),
    DeviceCase("table_wise", operation="path"),
    DeviceCase("table_wise", pooled=False, index_dedup=True),
    *(DeviceCase(sharding, tables=26) for sharding in ("table_wise", "row_wise", UNSHARDED)),
    DeviceCase(UNSHARDED, pooled=False, tables=26),
]
# A rank of others, whose tables have replicas here.
_ELSEWHERE = [DeviceCase(sharding, home="elsewhere") for sharding in ("table_wise", "table_row_wise")]
# MLPs of more columns than the kernels step.
_WIDE = [
    DeviceCase(sharding, operation="path", optimizer=optimizer, hidden=64)
    for sharding in ("table_wise", "row_wise", "data_parallel")
    for optimizer in ("EXACT_ROWWISE_ADAGRAD", "ADAM")
]
# The current device is another.
_OF_TWO_DEVICES = [
    DeviceCase(sharding, pooled, operation, device=1)
    for pooled in (True, False)
    for operation in ("mult", "path")
    for sharding in ("table_wise", "row_wise", "data_parallel", UNSHARDED)
]


def cases() -> list[DeviceCase]:
    """Every case once."""
    every = [*REFERENCE, *_ELSEWHERE, *_WIDE, *_OF_TWO_DEVICES, *_cases(True), *_cases(False)]
    # Unsharded collections have no fused optimizer.
    every = [replace(c, optimizer="EXACT_ADAGRAD") if c.sharding == UNSHARDED else c for c in every]
    return list({case.id: case for case in every}.values())


# Calls with tensors on several devices, by name, and what the ValueError says of the tensor; see `device_refusals`.
REFUSED = {
    "operator: ids on another device": "ids on cuda:1; allowed: cuda:0",
    "operator: ids on the host": "ids on cpu; allowed: cuda:0",
    "operator: offsets on another device": "offsets on cuda:1; allowed",
    "operator: weights of ids": "weights of ids on cpu; allowed: cuda:0",
    "operator: a partition": "a partition of table 't' on cuda:1; allowed",
    "operator: a class map on the host": "a class map of table 't' on cpu; allowed: cuda:0",
    "step: a gradient": "a gradient of shape (2, 4) on cuda:1; allowed",
    "step: a state on the host": "state of shape (2, 4), torch.float32 on cpu; allowed",
    "step: touched rows": "touched of shape (2,), torch.uint8 on cuda:1; allowed",
    "step: a class map": "a class map of table 't' on cuda:1; allowed",
    "rows: their numbers": "rows on cpu with gradients on cuda:0; allowed: cuda:0",
    "rows: their gradients": "gradients on cuda:1; allowed: cuda:0",
    "rows: a state": "torch.float32 on cuda:1; allowed",
    "collection: features on the host": "ids on cpu",
    "collection: features on another device": "ids on cuda:1",
    "collection: a partition on the host": "a partition of table 't' on cpu; allowed: cuda:0",
    "collection: a class map on another device": "a class map of table 't' on cuda:1; allowed: cuda:0",
}

# The recorder sees this of each of `device_faults`: the kind and the operation, or the error.
SEEN = {
    "an item": "host synchronisations, item",
    "a list": "host synchronisations, tolist",
    "a condition": "host synchronisations, item",
    "rows that are not zero": "host synchronisations, nonzero",
    "unique ids": "host synchronisations, unique2",
    "rows by a mask": "host synchronisations, index",
    "a stream": "host synchronisations, stream",
    "a list on the device": "blocking copies, to the device",
    "a copy to the device": "blocking copies, to the device",
    "a copy to the host": "blocking copies, to the host",
    "a copy to the host below autograd": "blocking copies, to the host",
    "a copy of memory that is not pinned": "blocking copies, to the device, by memory that is not pinned",
    "a copy of pinned memory": "",
    "a batch of the loader": "",
    "metrics of a window": "host synchronisations, tolist",
    "an address on the host": "DevicePointerOnHostError",
    "a sum over devices": "cuda:0",
    "a launch beside the current device": "WrongDeviceError",
    "a launch on memory of the host": "WrongDeviceError",
    "an id out of range": "IndexError: table 't', feature 'f': id 10 is outside [0, 10)",
    "a grid that the device knows": "a grid of",
}
