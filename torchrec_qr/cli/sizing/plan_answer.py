"""The answer of ``torchrec-qr plan`` for one device."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.distributed.planner.types import PlannerError, PlannerErrorType

from torchrec_qr.cli.sizing.plan_file import SavedPlan, SavedTable, SavedVariant, saved_ranks
from torchrec_qr.cli.sizing.sized_job import Sizing, Tables
from torchrec_qr.configs import stored_bytes, stored_shapes
from torchrec_qr.planner import EstimatedPlan


@dataclass(frozen=True)
class Totals:
    """Sums over one variant of the tables.

    Args:
        bytes_stored (int): of values.
        bytes_held (float | None): with optimizer state and buffers, on the rank that has most; None: nothing fits.
        fewest_ranks (int | None): that fit; None: no number that was tried.
    """

    name: str
    parameters: int
    bytes_stored: int
    bytes_held: float | None
    step_ms: float | None
    balance: float | None
    fewest_ranks: int | None


@dataclass(frozen=True)
class Answer:
    """A plan for the ranks of one device, or why there is none.

    Args:
        sizing (Sizing): the tables and the cluster.
        estimated (EstimatedPlan | None): the plan. None if none fits.
        failure (PlannerError | None): why none fits.
        totals (Sequence[Totals]): those of the tables as given, and of the variants.
        compared (Sequence[str]): the variants that the user named.
    """

    sizing: Sizing
    estimated: EstimatedPlan | None
    failure: PlannerError | None
    totals: Sequence[Totals]
    compared: Sequence[str]

    @classmethod
    def of(cls, sizing: Sizing, variants: Sequence[str]) -> "Answer":
        """Returns the answer, with the totals of the variants, or of the full tables if there are none."""
        estimated, failure = _estimated(sizing)
        totals = [_totals("as given", sizing, estimated)]
        for name in variants or ["full"]:
            variant = sizing.variant(name)
            totals.append(_totals(name, variant, _estimated(variant)[0]))
        return cls(sizing, estimated, failure, totals, variants)

    @property
    def given(self) -> Totals:
        """The totals of the tables as given."""
        return self.totals[0]

    def saved(self) -> SavedPlan:
        """Returns the answer for a file."""
        request, estimated = self.sizing.request(), self.estimated
        return SavedPlan(
            request=request,
            fingerprint=request.fingerprint(self.sizing.meanings()),
            feasible=estimated is not None,
            peak_bytes=None if self.given.bytes_held is None else int(self.given.bytes_held),
            step_ms=self.given.step_ms,
            ranks=() if estimated is None else saved_ranks(estimated),
            tables=() if estimated is None else tuple(map(SavedTable.planned, estimated.tables)),
            totals={"bytes_full": _bytes(self.sizing.variant("full").tables), "bytes": self.given.bytes_stored},
            sync=None if estimated is None else self.sizing.sync(estimated),
            error=None if self.failure is None else str(self.failure),
            compare={
                t.name: SavedVariant(t.bytes_stored, t.bytes_held is not None, t.fewest_ranks)
                for t in self.totals[1:]
                if t.name in self.compared
            },
        )


def _estimated(sizing: Sizing) -> tuple[EstimatedPlan | None, PlannerError | None]:
    try:
        return sizing.plan(), None
    except PlannerError as error:
        if error.error_type != PlannerErrorType.INSUFFICIENT_STORAGE:
            raise
        return None, error


def _totals(name: str, sizing: Sizing, estimated: EstimatedPlan | None) -> Totals:
    return Totals(
        name=name,
        parameters=_parameters(sizing.tables),
        bytes_stored=_bytes(sizing.tables),
        bytes_held=None if estimated is None else max(estimated.ranks.memory),
        step_ms=None if estimated is None else estimated.step_ms,
        balance=None if estimated is None else estimated.ranks.balance,
        fewest_ranks=sizing.fewest_ranks(),
    )


def _parameters(tables: Tables) -> int:
    return sum(rows * columns for table in tables for rows, columns, _ in stored_shapes(table))


def _bytes(tables: Tables) -> int:
    return sum(stored_bytes(table) for table in tables)
