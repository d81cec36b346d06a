"""The variants of the step benchmark by name."""

from benchmarks.step_lone_variants import DlrmBag, FusedAlone, Tbe
from benchmarks.step_node_variants import CopyPerNode, CopyPerRank
from benchmarks.step_sharded_variants import (
    Fallback,
    Full,
    FullOurPlanner,
    Ours,
    OursOurPlanner,
    StockPooled,
    StockUnpooled,
)
from benchmarks.step_variant import Variant

VARIANTS: dict[str, type[Variant]] = {
    "full": Full,
    "full_our_planner": FullOurPlanner,
    "stock_pooled": StockPooled,
    "stock_unpooled": StockUnpooled,
    "dlrm_bag": DlrmBag,
    "tbe": Tbe,
    "fused_alone": FusedAlone,
    "fused": Ours,
    "fused_our_planner": OursOurPlanner,
    "fallback": Fallback,
    "copy_per_node": CopyPerNode,
    "copy_per_rank": CopyPerRank,
}
