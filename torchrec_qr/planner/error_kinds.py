"""Kinds of TorchRec's ``PlannerError`` that it has since 1.8; 1.6 has no names for them but ``OTHER``."""

from torchrec.distributed.planner.types import PlannerErrorType

WRONG_INPUT: PlannerErrorType = getattr(PlannerErrorType, "INPUT_VALIDATION", PlannerErrorType.OTHER)
NOT_IN_PLAN: PlannerErrorType = getattr(PlannerErrorType, "MISSING_MODULE_IN_PLAN", PlannerErrorType.OTHER)
