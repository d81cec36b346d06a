"""Full rows of a table: the S embeddings that its partitions compose."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig

from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
from torchrec_qr.modules.embedding_collection import CompositionalEmbeddingCollection
from torchrec_qr.modules.table import Table
from torchrec_qr.ops.arguments import Batch
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.feature_lookup import look_up_features

Collection = CompositionalEmbeddingBagCollection | CompositionalEmbeddingCollection

# Look up so many stored scalars at a time, because PyTorch's lookups copy the rows of each id: 64 MiB.
_SCALARS = 1 << 24


def materialize(collection: Collection, table: str, ids: Tensor | Sequence[int] | None = None) -> Tensor:
    """Returns full rows of a table, compose_j( W_j[p_j(x)] ) for each id x: those of all S ids, or of ``ids``.

    Rows equal the embeddings of a forward, in value and in type. Under ``path`` the roundings depend on the number of
    ids. The result is a copy without gradients.

    Args:
        collection (Collection): an unsharded `CompositionalEmbeddingBagCollection` or
            `CompositionalEmbeddingCollection`.
        table (str): the name of a table, plain or compositional.
        ids (Tensor | Sequence[int] | None): (N,) integers in [0, S), or None for 0 to S - 1. A table with ``id_hash``
            needs them, and takes any int64.

    Returns:
        Tensor: (N, D) or (S, D) fp32, on the collection's device. `materialized_blocks` holds fewer rows at a time.

    Raises:
        ValueError: the collection has no such table, ids are not one-dimensional or lack though the table hashes them,
            or the collection is on the meta device.
        TypeError: the collection is none of ours or is sharded, or ids are not integers.
        IndexError: an id is outside [0, S), whatever the table's ``out_of_range``, or outside of int64.

    Example:
        >>> import torch
        >>> from torchrec_qr import (
        ...     CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder)
        >>> from torchrec_qr.inference import materialize
        >>> def rows_of(*values):
        ...     return lambda weight: weight.data.copy_(torch.tensor(values).unsqueeze(1))
        >>> ebc = CompositionalEmbeddingBagCollection(tables=[
        ...     CompositionalEmbeddingBagConfig(name="t_user", feature_names=["user"], num_embeddings=6,
        ...         embedding_dim=4, partitions=QuotientRemainder(num_collisions=2),
        ...         init_fn=[rows_of(1., 2., 3.), rows_of(1., 10.)])])
        >>> materialize(ebc, "t_user")[:, 0]
        tensor([ 1.,  2.,  3., 10., 20., 30.])
        >>> materialize(ebc, "t_user", ids=[5, 0])
        tensor([[30., 30., 30., 30.],
                [ 1.,  1.,  1.,  1.]])
        >>> torch.nn.Embedding.from_pretrained(materialize(ebc, "t_user"))
        Embedding(6, 4)
    """
    source = _Source(collection, table)
    if ids is not None:
        return source.rows(source.checked(ids))
    source.require_id_range()
    full = torch.empty(source.num_ids, source.dim, device=collection.device)
    for first, block in source.blocks(source.num_ids_at_once):
        full[first : first + len(block)] = block
    return full


def materialized_blocks(collection: Collection, table: str, num_rows: int = 65_536) -> Iterator[Tensor]:
    """Returns an iterator over the full rows of a table, block after block, so that S × D floats are never held.

    Args:
        collection (Collection): see `materialize`.
        table (str): see `materialize`.
        num_rows (int): the rows of each block but the last, which may have fewer.

    Returns:
        Iterator[Tensor]: (``num_rows``, D) fp32 of ids 0, 1, …, on the collection's device.

    Raises:
        ValueError: ``num_rows`` is below 1, or the table hashes its ids. See also `materialize`.
        TypeError: see `materialize`.

    Example:
        >>> from torchrec_qr import CompositionalEmbeddingConfig, CompositionalEmbeddingCollection, MixedRadix
        >>> from torchrec_qr.inference import materialized_blocks
        >>> ec = CompositionalEmbeddingCollection(tables=[
        ...     CompositionalEmbeddingConfig(name="t_item", feature_names=["item"], num_embeddings=1000,
        ...         embedding_dim=16, partitions=MixedRadix(sizes=[10, 10, 10]))])
        >>> [tuple(block.shape) for block in materialized_blocks(ec, "t_item", num_rows=400)]
        [(400, 16), (400, 16), (200, 16)]
    """
    source = _Source(collection, table)
    source.require_id_range()
    if num_rows < 1:
        raise ValueError(f"table {table!r}: num_rows={num_rows!r}; allowed: 1 or more")
    return (block for _, block in source.blocks(num_rows))


def tables_of(collection: Collection) -> nn.ModuleDict:
    """Returns the tables of an unsharded collection that has values.

    Raises:
        TypeError: the collection is none of ours, or is sharded.
        ValueError: the collection is on the meta device.
    """
    if isinstance(collection, ShardedEmbeddingModule):
        raise TypeError(
            f"{type(collection).__name__} is sharded; allowed: the unsharded collection. Save the sharded model by "
            "torch.distributed.checkpoint.save, and load it into an unsharded one by "
            "torchrec_qr.distributed.checkpoint.load(…, no_dist=True)"
        )
    if not isinstance(collection, Collection):
        raise TypeError(
            f"{type(collection).__name__} is no float collection of torchrec_qr; allowed: "
            "CompositionalEmbeddingBagCollection, CompositionalEmbeddingCollection, such as a part of the model before "
            "it was quantised"
        )
    if collection.device.type == "meta":
        raise ValueError(f"{type(collection).__name__} is on the meta device, without values; allowed: a real device")
    if isinstance(collection, CompositionalEmbeddingBagCollection):
        return collection.embedding_bags
    return collection.embeddings


def table_of(collection: Collection, table: str) -> tuple[Table, EmbeddingBagConfig | EmbeddingConfig]:
    """Returns a table of an unsharded collection that has values, and its config.

    Raises:
        ValueError: the collection has no such table. See also `tables_of`.
        TypeError: see `tables_of`.
    """
    tables = tables_of(collection)
    if table not in tables:
        raise ValueError(f"table {table!r} is not in the collection; allowed: {', '.join(tables)}")
    (config,) = (c for c in collection.embedding_configs() if c.name == table)
    return cast(Table, tables[table]), config


class _Source:
    """The rows of one table."""

    def __init__(self, collection: Collection, table: str) -> None:
        own, config = table_of(collection, table)
        self.num_ids = config.num_embeddings
        maps = [] if own.class_map is None else [own.class_map]
        self._table, self._device = table, collection.device
        self._is_hashed = own.layout.hash_seed is not None
        self._description = Description([own.layout], [table], maps)
        self._weights = [weight.detach() for weight in own.weights()]
        self.dim = own.layout.dim
        self.num_ids_at_once = max(1, _SCALARS // sum(own.layout.widths))

    def require_id_range(self) -> None:
        """Raises ValueError if the table hashes its ids, which then have no range."""
        if self._is_hashed:
            raise ValueError(
                f"table {self._table!r}: all rows of a table with id_hash, whose ids are any int64; allowed: "
                "materialize(collection, table, ids) with the ids to compose"
            )

    def rows(self, ids: Tensor) -> Tensor:
        """Returns (N, D) fp32 of ids (N,), which `checked` allows."""
        if len(ids) > self.num_ids_at_once:
            return torch.cat([self.rows(chunk) for chunk in ids.split(self.num_ids_at_once)])
        starts = [0, len(ids)]
        batch = Batch(ids, torch.tensor(starts), None, pooled=False, starts=starts)
        (rows,) = look_up_features(self._description, self._weights, batch)
        return rows

    def blocks(self, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yields the first id and the rows of consecutive ids, in order."""
        for first in range(0, self.num_ids, num_rows):
            yield first, self.rows(torch.arange(first, min(first + num_rows, self.num_ids), device=self._device))

    def _as_tensor(self, ids: Sequence[int]) -> Tensor:
        try:
            return torch.tensor(ids, dtype=None if len(ids) else torch.int64)
        except (RuntimeError, ValueError):
            # Search after the failure alone, because a list may be long.
            for x in ids:
                if isinstance(x, int) and not -(2**63) <= x < 2**63:
                    allowed = "-2^63 to 2^63 - 1, so the int64 of the same bits" if self._is_hashed else self._range
                    raise IndexError(f"table {self._table!r}: id {x}; allowed: {allowed}") from None
            raise

    @property
    def _range(self) -> str:
        return f"0 to {self.num_ids - 1}"

    def checked(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Returns ids on the device of the table, int64."""
        given = ids if isinstance(ids, Tensor) else self._as_tensor(ids)
        if given.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"table {self._table!r}: ids have dtype {given.dtype}; allowed: int32, int64")
        if given.dim() != 1:
            raise ValueError(f"table {self._table!r}: ids have shape {tuple(given.shape)}; allowed: (N,)")
        if given.numel() and not self._is_hashed:
            low, high = (int(x) for x in given.aminmax())
            if low < 0 or high >= self.num_ids:
                outside = low if low < 0 else high
                raise IndexError(f"table {self._table!r}: id {outside}; allowed: {self._range}")
        return given.to(self._device, torch.int64)
