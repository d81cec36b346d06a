"""The lookup of tables of which each node has a copy: the nodes' gradients are summed before rows are stepped.

A lookup reads the rows of a batch once each, and composes embeddings of them. The backward then has one gradient per
row that was read. Ranks of all nodes that hold the same rows, the peers, send each other these rows and gradients:

    rank of node k:   (rows_k, g_k)   →   all nodes:   row r steps by  (1 / n) · Σ_k Σ_{i: rows_k[i] = r} g_k[i]

Every peer sums in the order of the nodes, so that copies stay equal bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_qr.distributed.node_env import Peers
from torchrec_qr.ops.arguments import Batch, DenseGradient, Outcome
from torchrec_qr.ops.description import Description, PartitionLayout, TableLayout
from torchrec_qr.ops.dispatch import update_rows
from torchrec_qr.ops.lookup import stepped_lookup
from torchrec_qr.ops.update_rules import Update

# A row number is int64, and travels as two int32 beside the bits of its gradient.
_WORDS_OF_ROW = 2
# Up to so many rows of a weight for each that is looked up, a mask of all rows is faster than sorting.
_MASKED = 16


@dataclass(frozen=True)
class CopiedTables:
    """The parts of a lookup of copies, beside the batch.

    Args:
        tables (Description): the tables.
        weights (list[Tensor]): per table its weights: rows of this rank's copy, or a replica.
        is_copied (list[bool]): whether a weight is of a copy. The gradients of others go to autograd.
        updates (Callable[[], list[Outcome]]): returns per weight the next `Update` of a copied one, None if it stays.
        gradients (list[Outcome]): per weight the `DenseGradient` of one that is not copied, else None.
    """

    tables: Description
    weights: list[Tensor]
    is_copied: list[bool]
    updates: Callable[[], list[Outcome]]
    gradients: list[Outcome]


def look_up_copies(given: CopiedTables, batch: Batch, peers: Peers) -> Tensor:
    """Returns what `torchrec_qr.ops.lookup.stepped_lookup` returns; the backward steps the rows of all copies.

    Args:
        given (CopiedTables): the tables.
        batch (Batch): the batch of this rank, with ``starts``.
        peers (Peers): the ranks that hold the same rows.
    """
    copied = iter(zip(given.weights, given.is_copied, strict=True))
    rows: list[Tensor] = []
    maps: list[Tensor] = []
    layouts: list[TableLayout] = []
    num_ids: list[int] = []
    for table, ids, class_map in _ids_of_tables(given.tables, batch):
        numbers = []
        for p in table.partitions:
            found = p.rows_of(ids, class_map)
            weight, is_copied = next(copied)
            if is_copied:
                own, found = unique_rows(found, weight.shape[0])
                rows.append(own)
            numbers.append(found)
        # Have an entry without ids too, because kernels refuse a map of no memory.
        maps.append(torch.stack(numbers) if len(ids) else ids.new_zeros(len(numbers), 1))
        num_ids.append(len(ids))
        partitions = tuple(PartitionLayout(p.width, map_row=k) for k, p in enumerate(table.partitions))
        # Say neither how ids travel nor how they are hashed, because the numbers of ids are looked up in their place.
        path = table.path_hidden, table.path_activation
        layouts.append(TableLayout(table.operation, partitions, table.num_features, maps[-1].shape[1], None, *path))
    own_weights = [w for w, is_copied in zip(given.weights, given.is_copied, strict=True) if is_copied]

    def updates() -> list[Outcome]:
        return [u for u, is_copied in zip(given.updates(), given.is_copied, strict=True) if is_copied]

    read = iter(_ReadRows.apply(peers, updates, rows, *own_weights))
    weights = [next(read) if is_copied else w for w, is_copied in zip(given.weights, given.is_copied, strict=True)]
    numbered = torch.cat([torch.arange(n, device=batch.ids.device) for n in num_ids])
    outcomes = [DenseGradient() if outcome is None else outcome for outcome in given.gradients]
    tables = Description(layouts, given.tables.names, maps)
    return stepped_lookup(tables, weights, batch._replace(ids=numbered), lambda: outcomes)


def _ids_of_tables(tables: Description, batch: Batch) -> list[tuple[TableLayout, Tensor, Tensor | None]]:
    assert batch.starts is not None
    out, first = [], 0
    for table, class_map in zip(tables.tables, tables.maps_of_tables(), strict=True):
        last = first + table.num_features
        out.append((table, table.ids_of(batch.ids[batch.starts[first] : batch.starts[last]]), class_map))
        first = last
    return out


def unique_rows(rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Returns the unique ones of ``rows`` (N,) in [0, num_rows), ascending, and (N,) the number of each among them.

    On a GPU the result has N rows, those past the unique ones -1, so that the host waits for no count.

    Example:
        >>> unique_rows(torch.tensor([7, 3, 7, 7]), num_rows=8)
        (tensor([3, 7]), tensor([1, 0, 1, 1]))
    """
    if rows.device.type != "cpu":
        return padded_unique(rows)
    if num_rows > _MASKED * len(rows):
        unique, numbers = rows.unique(return_inverse=True)
        return unique, numbers
    is_used = torch.zeros(num_rows, dtype=torch.bool)
    is_used[rows] = True
    unique = is_used.nonzero().squeeze(1)
    number_of = torch.empty(num_rows, dtype=torch.int64)
    number_of[unique] = torch.arange(len(unique))
    return unique, number_of[rows]


def padded_unique(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what `unique_rows` returns on a GPU.

    Example:
        >>> padded_unique(torch.tensor([7, 3, 7, 7]))
        (tensor([ 3,  7, -1, -1]), tensor([1, 0, 1, 1]))
    """
    ordered, order = rows.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    number = is_first.cumsum(0) - 1
    unique = torch.full_like(ordered, -1).scatter_(0, number, ordered)
    return unique, torch.empty_like(number).scatter_(0, order, number)


class _ReadRows(torch.autograd.Function):
    """Reads rows of weights, each once; the backward sums their gradients over the nodes, and steps the rows."""

    @staticmethod
    def forward(
        ctx: Any, peers: Peers, updates: Callable[[], list[Outcome]], rows: list[Tensor], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.updates, ctx.rows, ctx.weights = updates, rows, weights
        # Send the counts at once, so that the backward need not wait for them.
        ctx.counts = Counts(peers, [len(own) for own in rows]) if any(ctx.needs_input_grad) else None
        # Return fp32, because the gradients are of the type of what is returned.
        return tuple(w.index_select(0, own.clamp(min=0)).float() for w, own in zip(weights, rows, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        peers: Peers = ctx.counts.peers
        of_weights = gathered(ctx.rows, gradients, ctx.counts)
        for weight, of_nodes, update in zip(ctx.weights, of_weights, ctx.updates(), strict=True):
            if isinstance(update, Update):
                rows, summed = summed_rows(of_nodes, weight.shape[0], 1 / peers.divisor)
                # Step `.data`, because the graph of an earlier forward may hold this tensor.
                update_rows(weight.data, rows, summed, update)
        return None, None, None, *(None for _ in ctx.weights)


class Counts:
    """The numbers of rows that peers send of each weight, which are under way.

    Args:
        peers (Peers): the ranks.
        own (list[int]): those of this rank.
    """

    def __init__(self, peers: Peers, own: list[int]) -> None:
        self.peers = peers
        self._sent = torch.tensor(own, dtype=torch.int64)
        self._received = torch.empty(peers.num_nodes, len(own), dtype=torch.int64)
        self._work: Any = dist.all_gather(
            list(self._received.unbind()), self._sent, group=peers.host_group, async_op=True
        )

    def wait(self) -> list[list[int]]:
        """Returns the counts of each node."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        counts: list[list[int]] = self._received.tolist()
        return counts


def gathered(rows: Sequence[Tensor], gradients: Sequence[Tensor], counts: Counts) -> list[list[tuple[Tensor, Tensor]]]:
    """Returns per weight the rows (n,) of each node and their gradients (n, D).

    Args:
        rows (Sequence[Tensor]): per weight the rows of this rank.
        gradients (Sequence[Tensor]): their gradients, fp32.
        counts (Counts): the numbers of rows of all nodes.
    """
    of_nodes = counts.wait()
    widths = [gradient.shape[1] for gradient in gradients]
    # Put all row numbers before all gradients, and send an even number of words, because int64 must be aligned.
    words = max(_num_words(of, widths) for of in of_nodes)
    parts = [part.reshape(-1).view(torch.int32) for part in (*rows, *gradients)]
    sent = torch.cat([*parts, parts[0].new_zeros(words - sum(map(len, parts)))])
    received = [torch.empty_like(sent) for _ in of_nodes]
    if words:
        dist.all_gather(received, sent, group=counts.peers.group)
    out: list[list[tuple[Tensor, Tensor]]] = [[] for _ in widths]
    for of, message in zip(of_nodes, received, strict=True):
        end = sum(of) * _WORDS_OF_ROW
        of_rows = message[:end].view(torch.int64).split(of)
        of_gradients = message[end:].view(torch.float32)[: _num_floats(of, widths)]
        sizes = [n * width for n, width in zip(of, widths, strict=True)]
        for found, own_rows, own_gradients, width in zip(out, of_rows, of_gradients.split(sizes), widths, strict=True):
            found.append((own_rows, own_gradients.view(-1, width)))
    return out


def _num_floats(counts: Sequence[int], widths: Sequence[int]) -> int:
    return sum(n * width for n, width in zip(counts, widths, strict=True))


def _num_words(counts: Sequence[int], widths: Sequence[int]) -> int:
    words = sum(counts) * _WORDS_OF_ROW + _num_floats(counts, widths)
    return words + words % 2


def summed_rows(of_nodes: Sequence[tuple[Tensor, Tensor]], num_rows: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the rows of any node, each once, and (n, D) factor · Σ g of their gradients, in the order of the nodes.

    Args:
        of_nodes (Sequence[tuple[Tensor, Tensor]]): the rows (n,) of each node, in [0, num_rows), and their gradients.
        num_rows (int): the rows of the weight.
        factor (float): what the sums are multiplied by.

    Example:
        >>> first = torch.tensor([1, 4]), torch.tensor([[1.0], [2.0]])
        >>> second = torch.tensor([0, 4]), torch.tensor([[5.0], [8.0]])
        >>> [found.tolist() for found in summed_rows([first, second], num_rows=5)]
        [[0, 1, 4], [[5.0], [1.0], [10.0]]]
    """
    rows, numbers = unique_rows(torch.cat([own for own, _ in of_nodes]), num_rows)
    summed = of_nodes[0][1].new_zeros(len(rows), of_nodes[0][1].shape[1])
    for number, (_, gradient) in zip(numbers.split([len(own) for own, _ in of_nodes]), of_nodes, strict=True):
        # A node sends each row once, so that no two threads add to one row.
        summed.index_add_(0, number, gradient, alpha=factor)
    return rows, summed
