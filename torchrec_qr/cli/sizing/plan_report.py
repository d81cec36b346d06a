"""A plan as text of 100 columns, for one device or side by side for several."""

from collections.abc import Callable, Sequence

from torchrec_qr.cli.sizing.plan_answer import Answer, Totals
from torchrec_qr.cli.sizing.plan_file import Sync
from torchrec_qr.cli.sizing.rank_groups import RankGroups
from torchrec_qr.planner import EstimatedPlan
from torchrec_qr.planner.estimated_plan import TablePlan

COLUMNS = 100
_BAR = 24
_SHOWN = 40
_NAME = 25
_GIB = 2**30


def as_text(estimated: EstimatedPlan, groups: RankGroups | None = None, sync: Sync | None = None) -> str:
    """Returns ranks with a bar of their work, and tables with the reason of their place."""
    copies = [] if groups is None or sync is None else [*_copies(groups, sync), ""]
    return "\n".join([*copies, *_ranks(estimated), "", *_tables(estimated)])


def by_device(answers: Sequence[Answer]) -> str:
    """Returns the totals of each device and the place of each table, with a column for each device."""
    width = (COLUMNS - _NAME) // len(answers)

    def row(name: str, cells: Sequence[str]) -> str:
        return f"{name:<{_NAME}}" + "".join(f"{cell[: width - 1]:>{width}}" for cell in cells)

    def figure(name: str, of: Callable[[Answer], float | None], form: str) -> str:
        values = [of(answer) for answer in answers]
        return row(name, ["-" if value is None else format(value, form) for value in values])

    plans = [answer.estimated for answer in answers]
    syncs = [None if plan is None else answer.sizing.sync(plan) for answer, plan in zip(answers, plans, strict=True)]
    lines = [
        row("", [str(answer.sizing.spec.device) for answer in answers]),
        row("plan", ["does not fit" if plan is None else "fits" for plan in plans]),
        figure("step ms", lambda a: a.given.step_ms, ".3f"),
        figure("balance", lambda a: a.given.balance, ".3f"),
        figure("GiB of the fullest rank", lambda a: a.given.bytes_held and a.given.bytes_held / _GIB, ".2f"),
        figure("GiB of a rank for tables", lambda a: min(a.estimated.reserved) / _GIB if a.estimated else None, ".2f"),
        figure("fewest ranks", lambda a: a.given.fewest_ranks, "d"),
    ]
    if any(sync is not None for sync in syncs):
        lines.append(row("ms of a sync", ["-" if sync is None else f"{sync.sync_ms:.3f}" for sync in syncs]))
    lines.append("")
    tables = answers[0].sizing.tables
    shown = sorted(range(len(tables)), key=lambda t: -tables[t].num_embeddings)[:_SHOWN]
    for t in sorted(shown):
        places = ["-" if plan is None else _place(plan.tables[t]) for plan in plans]
        lines.append(row(_short(tables[t].name), places))
    if len(tables) > _SHOWN:
        lines.append(f"and {len(tables) - _SHOWN} smaller ones; --json has all")
    return "\n".join(lines)


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
        lines.append(f"{v.name:<10}{v.parameters:>20,} {stored:>9}{held:>14}{step:>10}{balance:>9}{fewest:>14}")
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
        name = _short(p.table.name)
        lines.append(
            f"{name:<24}{p.table.num_embeddings:>16,}{p.table.rows:>14,}  {p.option.sharding_type:<18}{_span(p)}"
        )
        lines.append(_cut(f"    {p.why}"))
    if len(estimated.tables) > _SHOWN:
        lines.append(f"and {len(estimated.tables) - _SHOWN} smaller ones; --json has all")
    return lines


def _copies(groups: RankGroups, sync: Sync) -> list[str]:
    apart = ", use_inter_host_allreduce=True" if groups.inter_host_allreduce else ""
    return [
        f"{groups.copies} groups of {groups.group_size} ranks; the ranks below are those of a group: DMPCollection(",
        f"    sharding_group_size={groups.group_size}, node_group_size={groups.node_group_size}{apart})",
        f"copies of shards besides the first: {sync.copied_bytes / _GIB:,.2f} GiB of values and state on all ranks",
        f"sync(): {sync.sync_bytes / _GIB:.2f} GiB of the fullest rank, {groups.copies_per_node} of {groups.copies} "
        f"copies a node, {sync.sync_ms:.3f} ms;",
        f"    every k steps it adds {sync.sync_ms:.3f} / k ms to a step",
    ]


def _place(p: TablePlan) -> str:
    return f"{p.option.sharding_type} {_span(p)}"


def _short(name: str) -> str:
    return name if len(name) <= 23 else f"{name[:22]}…"


def _span(p: TablePlan) -> str:
    ranks = sorted(set(p.ranks))
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    text = ",".join(map(str, ranks[:6]))
    return text if len(ranks) <= 6 else f"{text},… ({len(ranks)})"


def _cut(line: str) -> str:
    return line if len(line) <= COLUMNS else f"{line[: COLUMNS - 1]}…"
