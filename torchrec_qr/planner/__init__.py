"""Plans for compositional and plain tables: where each lies, what it costs, and why."""

from torchrec_qr.planner.costs import Cost
from torchrec_qr.planner.hardware import Hardware, hardware_named
from torchrec_qr.planner.placement import PlacedModel
from torchrec_qr.planner.planner import CompositionalEmbeddingShardingPlanner

__all__ = [
    "CompositionalEmbeddingShardingPlanner",
    "Cost",
    "Hardware",
    "PlacedModel",
    "hardware_named",
]
