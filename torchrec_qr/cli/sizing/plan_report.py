"""A plan as text of 100 columns for a person, and as JSON for a program."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchrec_qr.planner import EstimatedPlan
from torchrec_qr.planner.estimated_plan import TablePlan

COLUMNS = 100
_BAR = 24
_SHOWN = 40
_GIB = 2**30


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


def as_json(estimated: EstimatedPlan | None, world_size: int, bytes_full: int, bytes_stored: int) -> dict[str, Any]:
    """Returns the plan for machines; without one, ``feasible`` is false and there are no ranks and tables."""
    out: dict[str, Any] = {"world_size": world_size, "feasible": estimated is not None, "ranks": [], "tables": []}
    if estimated is not None:
        memory, work = estimated.ranks.memory, estimated.ranks.work_ms
        out["ranks"] = [
            {"rank": rank, "hbm_bytes": int(m), "work_ms": w}
            for rank, (m, w) in enumerate(zip(memory, work, strict=True))
        ]
        out["tables"] = [
            {
                "name": p.table.name,
                "num_embeddings": p.table.num_embeddings,
                "physical_rows": p.table.rows,
                "sharding_type": p.option.sharding_type,
                "ranks": list(p.ranks),
                "why": p.why,
            }
            for p in estimated.tables
        ]
    out["totals"] = {"bytes_full": bytes_full, "bytes": bytes_stored}
    return out


def as_text(estimated: EstimatedPlan) -> str:
    """Returns ranks with a bar of their work, and tables with the reason of their place."""
    return "\n".join([*_ranks(estimated), "", *_tables(estimated)])


def compared(variants: Sequence[Totals]) -> str:
    """Returns one row per variant."""
    lines = [
        f"{'tables':<10}{'parameters':>20}{'GiB':>10}{'GiB a rank':>14}{'step ms':>10}{'balance':>9}"
        f"{'fewest ranks':>14}"
    ]
    for v in variants:
        held = "does not fit" if v.bytes_held is None else f"{v.bytes_held / _GIB:.2f}"
        step = "-" if v.step_ms is None else f"{v.step_ms:.3f}"
        balance = "-" if v.balance is None else f"{v.balance:.3f}"
        fewest = "none" if v.fewest_ranks is None else str(v.fewest_ranks)
        stored = f"{v.bytes_stored / _GIB:,.2f}"
        lines.append(f"{v.name:<10}{v.parameters:>20,}{stored:>10}{held:>14}{step:>10}{balance:>9}{fewest:>14}")
    return "\n".join(lines)


def _ranks(estimated: EstimatedPlan) -> list[str]:
    costs = [estimated.ranks[rank] for rank in range(len(estimated.ranks))]
    group = estimated.topology.local_world_size
    rows = [(str(rank), cost) for rank, cost in enumerate(costs)]
    what = "rank"
    if len(costs) > _SHOWN:
        # Show the rank of each node that has most work.
        nodes = [costs[i : i + group] for i in range(0, len(costs), group)]
        rows = [(str(node), max(of_node, key=lambda c: c.work_ms)) for node, of_node in enumerate(nodes)]
        what = "node"
    most = max(cost.work_ms for cost in costs) or 1.0
    lines = [
        f"{what:>5}  {'work':<{_BAR}}{'ms':>10}{'lookup':>10}{'all-to-all':>12}{'all-reduce':>12}{'GiB':>10}"
        f"{'of it state':>13}"
    ]
    for name, cost in rows[:_SHOWN]:
        bar = "█" * round(_BAR * cost.work_ms / most)
        lines.append(
            f"{name:>5}  {bar:<{_BAR}}{cost.work_ms:>10.3f}{cost.lookup_ms:>10.3f}{cost.comms_ms:>12.3f}"
            f"{cost.reduce_ms:>12.3f}{cost.memory / _GIB:>10.2f}{cost.optimizer / _GIB:>13.2f}"
        )
    if len(rows) > _SHOWN:
        lines.append(f"       and {len(rows) - _SHOWN} more; --json has all")
    mean = sum(estimated.ranks.work_ms) / len(costs)
    lines.append(
        f"greatest work {most:.3f} ms, mean {mean:.3f}, balance {estimated.ranks.balance:.3f}; with collectives "
        f"{estimated.step_ms:.3f} ms a step"
    )
    all_to_all = sum(c.comms_ms for c in costs) / len(costs)
    all_reduce = sum(c.reduce_ms for c in costs) / len(costs)
    lines.append(f"communication of a rank, mean: all-to-all {all_to_all:.3f} ms, all-reduce {all_reduce:.3f} ms")
    return lines


def _tables(estimated: EstimatedPlan) -> list[str]:
    lines = [f"{'table':<24}{'rows':>16}{'stored':>14}  {'placement':<18}ranks"]
    largest = sorted(estimated.tables, key=lambda p: -p.table.num_embeddings)[:_SHOWN]
    shown = {p.table.fqn for p in largest}
    for p in (p for p in estimated.tables if p.table.fqn in shown):
        name = p.table.name if len(p.table.name) <= 23 else f"{p.table.name[:22]}…"
        lines.append(
            f"{name:<24}{p.table.num_embeddings:>16,}{p.table.rows:>14,}  {p.option.sharding_type:<18}{_span(p)}"
        )
        lines.append(_cut(f"    {p.why}"))
    if len(estimated.tables) > _SHOWN:
        lines.append(f"and {len(estimated.tables) - _SHOWN} smaller ones; --json has all")
    return lines


def _span(p: TablePlan) -> str:
    ranks = sorted(set(p.ranks))
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    text = ",".join(map(str, ranks[:6]))
    return text if len(ranks) <= 6 else f"{text},… ({len(ranks)})"


def _cut(line: str) -> str:
    return line if len(line) <= COLUMNS else f"{line[: COLUMNS - 1]}…"
