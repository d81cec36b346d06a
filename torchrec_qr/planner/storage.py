"""The bytes of a table's values and optimizer state under any plan."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.distributed.fused_params import RULES, has_effect, update_rule
from torchrec_qr.distributed.layout import DATA_PARALLEL, ROW_SPLIT, stored_columns
from torchrec_qr.ops.update_rules import UpdateRule
from torchrec_qr.planner.tables import PlannedTable, optimizer_of

DENSE = EmbeddingComputeKernel.DENSE.value
FUSED = EmbeddingComputeKernel.FUSED.value

MakeOptimizer = Callable[[Any], Optimizer]
"""Makes an optimizer of a list of parameters, such as ``torch.optim.Adam``."""

Stored = Sequence[tuple[int, int, torch.dtype]]
"""The rows, columns and type of each tensor."""


class DenseState:
    """The state of an optimizer of ordinary parameters, measured by a step of small ones of the same width.

    Args:
        make (MakeOptimizer | None): makes the optimizer. None means plain SGD, which has no state.

    Example:
        >>> DenseState(torch.optim.Adagrad).bytes_of(100, 8, torch.float32)  # sums, and a count of steps
        3204
    """

    def __init__(self, make: MakeOptimizer | None) -> None:
        self._make = make
        self._of_width: dict[tuple[int, torch.dtype], tuple[int, int]] = {}

    def bytes_of(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Returns the bytes of state of a parameter (rows, columns)."""
        if self._make is None:
            return 0
        if (columns, dtype) not in self._of_width:
            few, more = self._measure(2, columns, dtype), self._measure(4, columns, dtype)
            per_row = (more - few) // 2
            self._of_width[columns, dtype] = few - 2 * per_row, per_row
        fixed, per_row = self._of_width[columns, dtype]
        return fixed + rows * per_row

    def _measure(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        assert self._make is not None
        p = nn.Parameter(torch.zeros(rows, columns, dtype=dtype))
        p.grad = torch.zeros_like(p)
        optimizer = self._make([p])
        optimizer.step()
        values = optimizer.state[p].values()
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def shard_storage(
    table: PlannedTable, sharding_type: str, start: int, stop: int, block: int, num_blocks: int
) -> Stored:
    """Returns what a rank stores of a table for row block ``block`` of ``num_blocks`` and columns [start, stop).

    Replicas are not included: see `replicated_storage`.
    """
    assert table.config is not None
    split, base = sharding_type in ROW_SPLIT, table.config.base_partition
    stored = []
    for j, (rows, _, dtype) in enumerate(table.partitions):
        a, b = stored_columns(table.config, j, start, stop)
        if a == b or (split and j != base):
            continue
        if split:
            size = -(-rows // num_blocks)
            rows = max(min(size, rows - block * size), 0)
        stored.append((rows, b - a, dtype))
    return stored


def replicated_storage(table: PlannedTable, sharding_type: str) -> Stored:
    """Returns the replicas of a table, which every rank stores."""
    assert table.config is not None
    split, base = sharding_type in ROW_SPLIT, table.config.base_partition
    return [
        shape for j, shape in enumerate(table.partitions) if sharding_type == DATA_PARALLEL or (split and j != base)
    ]


def value_bytes(stored: Stored) -> int:
    """Returns the bytes of the values of tensors."""
    return sum(rows * columns * dtype.itemsize for rows, columns, dtype in stored)


def class_map_bytes(config: CompositionalConfig) -> int:
    """Returns the bytes of a table's class map, 0 for closed forms."""
    class_map = config.bound_partitions.class_map
    return 0 if class_map is None else class_map.numel() * class_map.element_size()


class OptimizerState:
    """The bytes of optimizer state of tables: of the fused optimizer, or else of the dense one."""

    def __init__(self, dense: MakeOptimizer | None = None) -> None:
        self._dense = DenseState(dense)
        self._rules: dict[str, tuple[UpdateRule, bool]] = {}

    def of_compositional(self, table: PlannedTable, kernel: str, stored: Stored) -> int:
        """Returns the state of the tensors that a compositional table stores.

        The fused optimizer steps replicas too, if there is one: see `distributed.customized_kernel.is_fused`.
        """
        if table.fqn not in self._rules:
            attached = any(has_effect(key, value) for key, value in table.fused_params.items())
            self._rules[table.fqn] = update_rule(table.name, table.fused_params), attached
        rule, attached = self._rules[table.fqn]
        if kernel != FUSED and not attached:
            return self._of_dense(stored)
        values = sum(_state_values(rule, rows, columns) for rows, columns, _ in stored)
        return 4 * (values + (len(stored) if rule.counts_steps else 0))

    def of_plain(self, table: PlannedTable, kernel: str, rows: int, columns: int) -> int:
        """Returns the state of a plain table: FBGEMM's, or the dense optimizer's under TorchRec's dense kernel."""
        if kernel == DENSE:
            return self._of_dense([(rows, columns, table.parameter.dtype)])
        optimizer = optimizer_of(table)
        if optimizer in RULES:
            return 4 * _state_values(RULES[optimizer](), rows, columns)
        # TorchRec assumes one float32 value of state per value for optimizers that compositional tables lack.
        return 4 * rows * columns

    def _of_dense(self, stored: Stored) -> int:
        return sum(self._dense.bytes_of(*tensor) for tensor in stored)


def _state_values(rule: UpdateRule, rows: int, columns: int) -> int:
    return sum(math.prod(shape) for shape in rule.state_shapes(rows, columns).values())
