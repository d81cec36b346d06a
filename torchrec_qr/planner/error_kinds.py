"""Kinds of ``PlannerError`` that TorchRec has since 1.8. TorchRec 1.6 calls them ``OTHER``."""

from torchrec.distributed.planner.types import PlannerErrorType

WRONG_INPUT: PlannerErrorType = getattr(PlannerErrorType, "INPUT_VALIDATION", PlannerErrorType.OTHER)
NOT_IN_PLAN: PlannerErrorType = getattr(PlannerErrorType, "MISSING_MODULE_IN_PLAN", PlannerErrorType.OTHER)
