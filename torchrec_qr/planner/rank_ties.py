"""Tables that a plan gives to the same ranks, which the search treats as one table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, product

from torchrec.distributed.planner.types import PlannerError, PlannerErrorType

from torchrec_qr.planner.costs import NO_COST, Cost
from torchrec_qr.planner.enumerators import Block, EqualShards, Option
from torchrec_qr.planner.error_kinds import WRONG_INPUT
from torchrec_qr.planner.tables import PlannedTable, some_names


class TiedOption(Option):
    """One option for each table of a group, with one sharding type and as many shards.

    Args:
        members (Sequence[Option]): the options, in the order of the group's tables.
        world_size (int): W.
    """

    __slots__ = ("members",)

    def __init__(self, members: Sequence[Option], world_size: int) -> None:
        first = members[0]
        everywhere = NO_COST
        for member in members:
            everywhere = everywhere + member.everywhere
        blocks = tuple(
            Block(of_members[0].scope, _summed([block.shards for block in of_members]))
            for of_members in zip(*(member.blocks for member in members), strict=True)
        )
        super().__init__(first.sharding_type, first.kernel, first.width, everywhere, blocks, world_size)
        self.members = tuple(members)


class RankTies:
    """Groups of tables whose shards lie on the same ranks. A table that nothing ties is a group of one.

    The tables of a group take one sharding type and one number of shards, and shard i of each lies on the same rank.

    Args:
        tables (Sequence[PlannedTable]): the tables of the model.
        same_rank_as (Mapping[str, str]): for the name of a table, that of the table whose ranks it takes.
        world_size (int): W.

    Attributes:
        groups (list[list[int]]): the numbers of the tables of each group.
        tables (list[PlannedTable]): the tables, each with the ranks that all tables of its group may have.
        bounds (list[tuple[int, ...] | None]): the ranks that may own each group. None means all.

    Raises:
        PlannerError: an unknown table, a table that is tied to itself, or tables that may share no rank.
    """

    def __init__(self, tables: Sequence[PlannedTable], same_rank_as: Mapping[str, str], world_size: int) -> None:
        self._world_size = world_size
        _check_names([table.name for table in tables], same_rank_as)
        by_root: dict[str | int, list[int]] = {}
        tied = {*same_rank_as, *same_rank_as.values()}
        for t, table in enumerate(tables):
            by_root.setdefault(_root(table.name, same_rank_as) if table.name in tied else t, []).append(t)
        self.groups = list(by_root.values())
        self.tables = list(tables)
        self.bounds: list[tuple[int, ...] | None] = []
        for group in self.groups:
            ranks = _common_ranks([tables[t] for t in group])
            self.bounds.append(ranks)
            for t in group if len(group) > 1 else ():
                self.tables[t] = replace(tables[t], ranks=ranks, same_rank_as=same_rank_as.get(tables[t].name))
        self._group_of = [0] * len(tables)
        for g, group in enumerate(self.groups):
            for t in group:
                self._group_of[t] = g

    def names(self, group: int) -> str:
        """Returns the names of the tables of a group."""
        return some_names([self.tables[t].name for t in self.groups[group]])

    def merged(self, choices: Sequence[Sequence[Option]]) -> list[Sequence[Option]]:
        """Returns the options of each group from those of each table. A group without an option has none."""
        return [self.options_of([choices[t] for t in group]) for group in self.groups]

    def checked(self, choices: Sequence[Sequence[Option]]) -> list[Sequence[Option]]:
        """Returns the options of each group, at least one.

        Raises:
            PlannerError: the tables of a group have no sharding type with equally many shards in common.
        """
        merged = self.merged(choices)
        for group, options in zip(self.groups, merged, strict=True):
            if options:
                continue
            offers = [
                f"{self.tables[t].name!r} may be {', '.join(dict.fromkeys(o.sharding_type for o in choices[t]))}"
                for t in group
            ]
            raise PlannerError(
                f"same_rank_as: {'; '.join(offers)}; allowed: a sharding type of all these tables, in equally many "
                "shards of each",
                PlannerErrorType.STRICT_CONSTRAINTS,
            )
        return merged

    def options_of(self, choices: Sequence[Sequence[Option]]) -> Sequence[Option]:
        """Returns the options of one group from those of its tables: per form the fastest one and the smallest one."""
        if len(choices) == 1:
            return choices[0]
        by_form = [
            {form: list(same) for form, same in groupby(sorted(options, key=_form), key=_form)} for options in choices
        ]
        tied = []
        for form in by_form[0]:
            if not all(form in of_table for of_table in by_form):
                continue
            fastest = [min(of_table[form], key=lambda o: (o.mean_work, o.mean_memory)) for of_table in by_form]
            smallest = [min(of_table[form], key=lambda o: (o.mean_memory, o.mean_work)) for of_table in by_form]
            tied.append(TiedOption(fastest, self._world_size))
            if any(a is not b for a, b in zip(fastest, smallest, strict=True)):
                tied.append(TiedOption(smallest, self._world_size))
        return tied

    def apart(self, options: Sequence[Option]) -> list[Option]:
        """Returns the option of each table from those of the groups."""
        apart: list[Option] = [options[g] for g in self._group_of]
        for group, option in zip(self.groups, options, strict=True):
            if isinstance(option, TiedOption):
                for t, member in zip(group, option.members, strict=True):
                    apart[t] = member
        return apart

    def sharding_types(self, options: Sequence[Option]) -> list[str]:
        """Returns the sharding type of each table from the options of the groups."""
        return [options[g].sharding_type for g in self._group_of]

    def ranks(self, of_groups: Sequence[list[list[int] | None]]) -> list[list[list[int] | None]]:
        """Returns the ranks of each table's blocks from those of the groups."""
        return [of_groups[g] for g in self._group_of]


def _form(option: Option) -> tuple[str, tuple[int, ...]]:
    """Returns what tied tables have in common: the sharding type, and the number of shards in each block."""
    return option.sharding_type, tuple(sum(equal.count for equal in block.shards) for block in option.blocks)


def _summed(of_members: Sequence[Sequence[EqualShards]]) -> tuple[EqualShards, ...]:
    """Returns the sum of several rows of equally many shards, as rows of equal shards again."""
    summed = list(of_members[0])
    for other in of_members[1:]:
        summed = [
            EqualShards(a[2] + b[2], min(a[1], b[1]) - max(a[0], b[0]))
            for a, b in product(_spans(summed), _spans(other))
            if max(a[0], b[0]) < min(a[1], b[1])
        ]
    return tuple(summed)


def _spans(shards: Sequence[EqualShards]) -> list[tuple[int, int, Cost]]:
    spans, at = [], 0
    for equal in shards:
        spans.append((at, at + equal.count, equal.cost))
        at += equal.count
    return spans


def _root(name: str, same_rank_as: Mapping[str, str]) -> str:
    """Returns the table at the end of a chain of ties."""
    seen = [name]
    while seen[-1] in same_rank_as:
        following = same_rank_as[seen[-1]]
        if following in seen:
            chain = " → ".join(map(repr, [*seen[seen.index(following) :], following]))
            raise PlannerError(
                f"same_rank_as: {chain}; allowed: a chain that ends at a table without same_rank_as", WRONG_INPUT
            )
        seen.append(following)
    return seen[-1]


def _check_names(known: Sequence[str], same_rank_as: Mapping[str, str]) -> None:
    names = set(known)
    for table, other in same_rank_as.items():
        for name in (table, other):
            if name not in names:
                raise PlannerError(
                    f"same_rank_as of table {table!r}: {other!r}; table {name!r} is not in the model; allowed: "
                    f"{some_names(sorted(names))}",
                    WRONG_INPUT,
                )


def _common_ranks(tables: Sequence[PlannedTable]) -> tuple[int, ...] | None:
    bound = [table for table in tables if table.ranks is not None]
    if not bound:
        return None
    common = sorted(set.intersection(*(set(table.ranks or ()) for table in bound)))
    if not common:
        each = "; ".join(f"{table.name!r} has ranks {list(table.ranks or ())}" for table in bound)
        raise PlannerError(
            f"same_rank_as: {each}; allowed: ranks with at least one in common, because these tables are tied",
            WRONG_INPUT,
        )
    return tuple(common)
