"""TorchRec's seam for tables that are not its own: the compute kernel ``customized_kernel``.

A plan names a kernel per table. TorchRec leaves the state of a table with this one to the subclass of its collection,
groups it apart from other tables, and takes what ``get_additional_fused_params`` returns into the ``fused_params`` of
the table and of its shards. So the layout of a table reaches the lookup of its shards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardedEmbeddingTable
from torchrec.distributed.types import ParameterSharding

from torchrec_qr.distributed.fused_params import says_something
from torchrec_qr.distributed.layout import ShardLayout, ShardLayouts

# A key that begins with "_" is no option of an optimizer.
_KEY = "_shard_layouts"


@dataclass
class CompositionalParameterSharding(ParameterSharding):
    """An entry of a plan for a compositional table, which carries the layouts of all such tables of its collection.

    They are one object, because TorchRec puts tables with different parameters into different groups.
    """

    layouts: ShardLayouts = field(default_factory=lambda: ShardLayouts({}))

    def get_additional_fused_params(self) -> dict[str, Any]:
        return {_KEY: self.layouts}


def with_customized_kernel(
    plan: Mapping[str, ParameterSharding], layouts: ShardLayouts
) -> dict[str, ParameterSharding]:
    """Returns a plan in which the tables of ``layouts`` have the customized kernel; ``plan`` stays as it is."""
    out = dict(plan)
    for name in layouts:
        values = {f.name: getattr(plan[name], f.name) for f in fields(ParameterSharding)}
        values["compute_kernel"] = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value
        out[name] = CompositionalParameterSharding(**values, layouts=layouts)
    return out


def layout_or_none(table: ShardedEmbeddingTable) -> ShardLayout | None:
    """Returns the layout of the table of a shard, as TorchRec describes it; None if it is a plain table."""
    layouts: ShardLayouts | None = (table.fused_params or {}).get(_KEY)
    return None if layouts is None else layouts[table.name]


def layout_of(table: ShardedEmbeddingTable) -> ShardLayout:
    """Returns what `layout_or_none` does, of a table that is known to be compositional."""
    found = layout_or_none(table)
    assert found is not None
    return found


def position_of(table: ShardedEmbeddingTable) -> int:
    """Returns which of the plan's shards a shard is; 0 under data-parallel, which has none."""
    return 0 if table.local_metadata is None else layout_of(table).shards.index(table.local_metadata)


def is_fused(table: ShardedEmbeddingTable) -> bool:
    """Returns whether rows are stepped in backward: the plan is fused, or the table has options of an optimizer.

    TorchRec's dense kernel, which is the one it has for data-parallel, would drop an attached optimizer in silence.
    """
    attached = any(says_something(key, value) for key, value in (table.fused_params or {}).items())
    return layout_of(table).compute_kernel == EmbeddingComputeKernel.FUSED.value or attached
