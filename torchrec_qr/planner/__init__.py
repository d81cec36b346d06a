"""A planner for plain and compositional tables, which returns a plan with its estimated costs."""

from torchrec_qr.planner.costs import Cost
from torchrec_qr.planner.estimated_plan import EstimatedPlan
from torchrec_qr.planner.hardware import Hardware, hardware_named
from torchrec_qr.planner.planner import CompositionalEmbeddingShardingPlanner

__all__ = [
    "CompositionalEmbeddingShardingPlanner",
    "Cost",
    "EstimatedPlan",
    "Hardware",
    "hardware_named",
]
