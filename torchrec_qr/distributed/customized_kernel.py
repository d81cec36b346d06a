"""TorchRec's compute kernel ``customized_kernel``, which compositional tables have.

TorchRec leaves the state of a table with this kernel to the subclass of its collection. It groups such tables apart
from others, and puts what ``get_additional_fused_params`` returns into the ``fused_params`` of the shards. The lookup
of a shard reads the layout of its table there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardedEmbeddingTable
from torchrec.distributed.types import ParameterSharding

from torchrec_qr.distributed.fused_params import has_effect
from torchrec_qr.distributed.layout import ShardLayout, ShardLayouts

# TorchRec passes no key that begins with "_" to an optimizer.
_KEY = "_shard_layouts"


@dataclass
class CompositionalParameterSharding(ParameterSharding):
    """A plan's entry for a compositional table, with the layouts of all such tables of its collection.

    They are one object, because TorchRec puts tables with other parameters into other groups.
    """

    layouts: ShardLayouts = field(default_factory=lambda: ShardLayouts({}))

    def get_additional_fused_params(self) -> dict[str, Any]:
        return {_KEY: self.layouts}


def with_customized_kernel(
    plan: Mapping[str, ParameterSharding], layouts: ShardLayouts
) -> dict[str, ParameterSharding]:
    """Returns a copy of a plan in which the tables of ``layouts`` have the customized kernel."""
    out = dict(plan)
    for name in layouts:
        values = {f.name: getattr(plan[name], f.name) for f in fields(ParameterSharding)}
        values["compute_kernel"] = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value
        out[name] = CompositionalParameterSharding(**values, layouts=layouts)
    return out


def layout_or_none(table: ShardedEmbeddingTable) -> ShardLayout | None:
    """Returns the layout of the table of a shard; None if the table is plain."""
    layouts: ShardLayouts | None = (table.fused_params or {}).get(_KEY)
    return None if layouts is None else layouts[table.name]


def layout_of(table: ShardedEmbeddingTable) -> ShardLayout:
    """Returns the layout of the compositional table of a shard."""
    found = layout_or_none(table)
    assert found is not None
    return found


def position_of(table: ShardedEmbeddingTable) -> int:
    """Returns the number of a shard in the plan, 0 under data-parallel."""
    return 0 if table.local_metadata is None else layout_of(table).shards.index(table.local_metadata)


def is_fused(table: ShardedEmbeddingTable) -> bool:
    """Returns whether the backward steps rows: the plan is fused, or the table has options of an optimizer.

    TorchRec's dense kernel, which data-parallel tables have, would ignore the options.
    """
    attached = any(has_effect(key, value) for key, value in (table.fused_params or {}).items())
    return layout_of(table).compute_kernel == EmbeddingComputeKernel.FUSED.value or attached
