"""Assigns the blocks of options to ranks: in order of work, the largest first, each to the rank with least work.

Memory decides between equal work. n blocks on W ranks take O(n log(nW)).
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchrec_qr.planner.costs import NO_COST
from torchrec_qr.planner.enumerators import Block, Option, Scope

# Up to so many blocks are moved once more, between the rank with most work and so many others.
_EVENED_OUT = 500
_OTHERS = 16

Entry = tuple[int, int, Block]
"""The number of a table, the number of a block in its option, and the block."""

Load = tuple[float, float]
"""The work and the bytes of a rank or a host, the balanced one first."""


@dataclass(frozen=True)
class Cluster:
    """The ranks and their free memory.

    Args:
        memory (tuple[float, ...]): bytes of each rank's device.
        host_memory (tuple[float, ...]): bytes of each rank's share of its host, for TorchRec's offloaded kernels.
        group (int): the ranks of a host.
    """

    memory: tuple[float, ...]
    host_memory: tuple[float, ...]
    group: int

    @property
    def world_size(self) -> int:
        """W."""
        return len(self.memory)


@dataclass(frozen=True)
class Misfit:
    """A block that fits no rank.

    Args:
        table (int): the number of its table.
        needs (float): its bytes.
        left (tuple[float, ...]): the bytes that each rank has left.
        on_host (bool): whether the bytes are the host's.
    """

    table: int
    needs: float
    left: tuple[float, ...]
    on_host: bool = False


@dataclass(frozen=True)
class Packing:
    """The ranks of all blocks.

    Args:
        ranks (list[list[list[int] | None]]): per table and block, the ranks of its shards in order. None means all.
        work (list[float]): ms of each rank.
    """

    ranks: list[list[list[int] | None]]
    work: list[float]

    @property
    def greatest(self) -> float:
        """The ms of the rank with most work."""
        return max(self.work)


def pack(
    options: Sequence[Option], bound: Sequence[Sequence[int] | None], cluster: Cluster, by_memory: bool = False
) -> Packing | Misfit:
    """Returns a packing of one option per table, or a block that does not fit.

    Args:
        options (Sequence[Option]): one option per table.
        bound (Sequence[Sequence[int] | None]): per table, the ranks that may own it. None means all.
        cluster (Cluster): the memory of the ranks.
        by_memory (bool): whether to balance bytes instead of work, so that more fits.
    """
    return _Packer(options, bound, cluster, by_memory).run()


class _Packer:
    def __init__(
        self, options: Sequence[Option], bound: Sequence[Sequence[int] | None], cluster: Cluster, by_memory: bool
    ) -> None:
        self._options, self._bound, self._cluster, self._by_memory = options, bound, cluster, by_memory
        world = cluster.world_size
        self._work = [0.0] * world
        self._memory = [0.0] * world
        self._host = [0.0] * world
        self._base_work = self._base_memory = self._base_host = 0.0
        self._ranks: list[list[list[int] | None]] = [[None] * len(o.blocks) for o in options]

    def run(self) -> Packing | Misfit:
        hosted: list[Entry] = []
        single: list[Entry] = []
        for t, option in enumerate(self._options):
            if option.everywhere is not NO_COST:
                self._base_work += option.everywhere.work_ms
                self._base_memory += option.everywhere.memory
            for b, block in enumerate(option.blocks):
                if block.scope is Scope.WORLD:
                    self._base_work += block.work_ms
                    self._base_memory += block.memory
                    self._base_host += block.host_memory
                else:
                    (hosted if block.scope is Scope.HOST else single).append((t, b, block))
        if (misfit := self._base_misfit()) is not None:
            return misfit
        self._hosts = [((0.0, 0.0), host) for host in range(self._cluster.world_size // self._cluster.group)]
        for entry in sorted(hosted, key=self._size, reverse=True):
            if (misfit := self._place_on_host(*entry)) is not None:
                return misfit
        self._heap = [(self._load(rank), rank) for rank in range(self._cluster.world_size)]
        heapq.heapify(self._heap)
        for entry in sorted(single, key=self._size, reverse=True):
            if (misfit := self._place_on_rank(*entry)) is not None:
                return misfit
        if not self._by_memory and len(single) <= _EVENED_OUT:
            self._even_out(single)
        return Packing(self._ranks, [self._base_work + w for w in self._work])

    def _even_out(self, single: list[Entry]) -> None:
        """Moves a block from the rank with most work, or swaps it for a smaller one, while that lowers the greater work
        of the two ranks.
        """
        on: list[list[Entry]] = [[] for _ in self._work]
        for t, b, block in single:
            ranks = self._ranks[t][b]
            assert ranks is not None
            on[ranks[0]].append((t, b, block))
        for _ in range(len(single)):
            most = max(range(len(self._work)), key=self._work.__getitem__)
            change = self._best_change(most, on)
            if change is None:
                return
            rank, out, back = change
            for entry, source, target in ((out, most, rank), (back, rank, most)):
                if entry is None:
                    continue
                t, b, block = entry
                self._add(source, -block.work_ms, -block.memory, -block.host_memory)
                self._add(target, block.work_ms, block.memory, block.host_memory)
                self._ranks[t][b] = [target]
                on[source].remove(entry)
                on[target].append(entry)

    def _best_change(self, most: int, on: list[list[Entry]]) -> tuple[int, Entry, Entry | None] | None:
        best, found = self._work[most] * (1 - 1e-6), None
        # Look at the ranks with least work alone, because a change with them gains most.
        others = heapq.nsmallest(_OTHERS, (r for r in range(len(on)) if r != most), key=self._work.__getitem__)
        for rank in others:
            for out in on[most]:
                for back in (None, *on[rank]):
                    moved = out[2].work_ms - (back[2].work_ms if back else 0.0)
                    if moved <= 0:
                        continue
                    greater = max(self._work[most] - moved, self._work[rank] + moved)
                    if greater < best and self._may_change(most, rank, out, back):
                        best, found = greater, (rank, out, back)
        return found

    def _may_change(self, most: int, rank: int, out: Entry, back: Entry | None) -> bool:
        for entry, target, leaving in ((out, rank, back), (back, most, out)):
            if entry is None:
                continue
            bound = self._bound[entry[0]]
            if bound is not None and target not in bound:
                return False
            freed, freed_host = (leaving[2].memory, leaving[2].host_memory) if leaving else (0.0, 0.0)
            block = entry[2]
            if not self._fits(target, block.memory - freed, max(block.host_memory - freed_host, 0.0)):
                return False
        return True

    def _size(self, entry: Entry) -> float:
        return entry[2].memory if self._by_memory else entry[2].work_ms

    def _load(self, rank: int) -> Load:
        if self._by_memory:
            return self._memory[rank], self._work[rank]
        return self._work[rank], self._memory[rank]

    def _left(self, rank: int) -> float:
        return self._cluster.memory[rank] - self._base_memory - self._memory[rank]

    def _fits(self, rank: int, memory: float, host: float) -> bool:
        if memory > self._left(rank):
            return False
        return not host or host <= self._cluster.host_memory[rank] - self._base_host - self._host[rank]

    def _add(self, rank: int, work: float, memory: float, host: float) -> None:
        self._work[rank] += work
        self._memory[rank] += memory
        self._host[rank] += host

    def _base_misfit(self) -> Misfit | None:
        """Returns the largest table on all ranks, if the tables on all ranks are too large for one rank."""
        if self._base_memory <= min(self._cluster.memory) and self._base_host <= min(self._cluster.host_memory):
            return None
        sizes = [
            option.everywhere.memory + sum(b.memory for b in option.blocks if b.scope is Scope.WORLD)
            for option in self._options
        ]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        others = self._base_memory - sizes[largest]
        return Misfit(largest, sizes[largest], tuple(m - others for m in self._cluster.memory))

    def _place_on_host(self, t: int, b: int, block: Block) -> Misfit | None:
        group, bound = self._cluster.group, self._bound[t]
        costs = [(s.cost.work_ms, s.cost.memory, s.cost.host) for s in block.shards for _ in range(s.count)]
        # Deal shards to the ranks of a host in turn, because there may be more of them than ranks.
        totals = [tuple(map(sum, zip(*costs[i::group], strict=True))) for i in range(min(group, len(costs)))]

        def fits(host: int) -> bool:
            if bound is not None and not all(host * group + i in bound for i in range(group)):
                return False
            return all(self._fits(host * group + i, memory, extra) for i, (_, memory, extra) in enumerate(totals))

        found = _pop_first(self._hosts, fits, lambda *_: True)
        if found is None:
            return Misfit(t, max(memory for _, memory, _ in totals), tuple(map(self._left, range(len(self._work)))))
        ranks = [found * group + i % group for i in range(len(costs))]
        for rank, cost in zip(ranks, costs, strict=True):
            self._add(rank, *cost)
        heapq.heappush(self._hosts, (max(map(self._load, range(found * group, (found + 1) * group))), found))
        self._ranks[t][b] = ranks
        return None

    def _place_on_rank(self, t: int, b: int, block: Block) -> Misfit | None:
        work, memory, host = block.work_ms, block.memory, block.host_memory
        bound = self._bound[t]
        if bound is None:
            rank = _pop_first(
                self._heap,
                lambda rank: self._fits(rank, memory, host),
                # Drop an entry with another load, because a later entry of the same rank replaces it.
                lambda load, rank: load == self._load(rank),
            )
        else:
            rank = self._least_loaded_of(bound, memory, host)
        if rank is None:
            left = tuple(self._left(r) for r in range(self._cluster.world_size))
            return Misfit(t, max(memory, host), left, on_host=bool(host))
        self._add(rank, work, memory, host)
        heapq.heappush(self._heap, (self._load(rank), rank))
        self._ranks[t][b] = [rank]
        return None

    def _least_loaded_of(self, ranks: Sequence[int], memory: float, host: float) -> int | None:
        fitting = [rank for rank in ranks if self._fits(rank, memory, host)]
        return min(fitting, key=lambda rank: (self._load(rank), rank)) if fitting else None


def _pop_first(
    heap: list[tuple[Load, int]], fits: Callable[[int], bool], is_current: Callable[[Load, int], bool]
) -> int | None:
    """Takes the least loaded number that fits from a heap, and returns it; None if none fits."""
    skipped: list[tuple[Load, int]] = []
    found = None
    while heap and found is None:
        load, number = heapq.heappop(heap)
        if not is_current(load, number):
            continue
        if fits(number):
            found = number
        else:
            skipped.append((load, number))
    for entry in skipped:
        heapq.heappush(heap, entry)
    return found
