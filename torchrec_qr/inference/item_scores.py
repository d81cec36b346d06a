"""The scores of all items of a table, and the best items of each user."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_qr.inference.best_scores import BestScores
from torchrec_qr.inference.full_rows import Collection, table_of
from torchrec_qr.inference.score_blocks import score_blocks


class TopItems(NamedTuple):
    """The best items of each user vector, best first.

    Args:
        scores (Tensor): (B, k) fp32.
        ids (Tensor): (B, k) int64.

    Example:
        >>> import torch
        >>> from torchrec_qr.inference import TopItems
        >>> TopItems(torch.tensor([[0.5, 0.25]]), torch.tensor([[7, 2]])).ids
        tensor([[7, 2]])
    """

    scores: Tensor
    ids: Tensor


@torch.no_grad()
def score_all(collection: Collection, table: str, user_vectors: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns the scores of all S items of a table, without the S × D table of their embeddings.

    scores[b, x] = u_b · e(x), with e(x) = compose_j( W_j[p_j(x)] ). Sums of rows are scored by K products (B × |P_j|),

        u · e(x) = Σ_j u_j · W_j[p_j(x)]                        (``add``; ``concat``, u_j being the columns of W_j),

    and products of rows by a product for all ids with one remainder (``mult``). ``docs/scoring.md`` has both.

    Args:
        collection (Collection): an unsharded `CompositionalEmbeddingBagCollection` or
            `CompositionalEmbeddingCollection`.
        table (str): the name of the items' table, plain or compositional.
        user_vectors (Tensor): u, (B, D) floats on the collection's device. They are taken as fp32.
        out (Tensor | None): (B, S) fp32, contiguous memory for the result. New memory costs its first writing.

    Returns:
        Tensor: (B, S) fp32, without a gradient. `top_items` does not hold so many.

    Raises:
        ValueError: the collection has no such table or is on the meta device, the user vectors are not (B, D) or are on
            another device, or ``out`` is no such memory.
        TypeError: the collection is none of ours or is sharded, or the user vectors are no floats.
        NotImplementedError: the table has ``id_hash``.

    Example:
        >>> import torch
        >>> from torchrec_qr import CompositionalEmbeddingCollection, CompositionalEmbeddingConfig, QuotientRemainder
        >>> from torchrec_qr.inference import score_all
        >>> def rows_of(*values):
        ...     return lambda weight: weight.data.copy_(torch.tensor(values).unsqueeze(1))
        >>> ec = CompositionalEmbeddingCollection(tables=[
        ...     CompositionalEmbeddingConfig(name="t_item", feature_names=["item"], num_embeddings=6, embedding_dim=4,
        ...         partitions=QuotientRemainder(num_collisions=2), init_fn=[rows_of(1., 2., 3.), rows_of(1., 10.)])])
        >>> score_all(ec, "t_item", torch.tensor([[1., 0., 0., 0.], [1., 1., 0., 0.]]))
        tensor([[ 1.,  2.,  3., 10., 20., 30.],
                [ 2.,  4.,  6., 20., 40., 60.]])
    """
    num_ids, users = _checked(collection, table, user_vectors)
    shape = (len(users), num_ids)
    if out is None:
        out = torch.empty(shape, device=users.device)
    elif (out.shape, out.dtype, out.device) != (shape, torch.float32, users.device) or not out.is_contiguous():
        raise ValueError(
            f"table {table!r}: out is {tuple(out.shape)}, {out.dtype}, on {out.device}; allowed: contiguous {shape}, "
            f"torch.float32, on {users.device}"
        )
    for _ in score_blocks(collection, table, users, num_ids, into=out):
        pass
    return out


@torch.no_grad()
def top_items(collection: Collection, table: str, user_vectors: Tensor, k: int) -> TopItems:
    """Returns the k items with the largest scores of each user vector: see `score_all`.

    The result is exact, the best first, and equal scores are in the order of ids. It holds about 2^20 scores at a time,
    and neither all B × S scores nor the S × D table. It has not run on a GPU.

    Args:
        collection (Collection): see `score_all`.
        table (str): see `score_all`.
        user_vectors (Tensor): see `score_all`.
        k (int): from 1 to S.

    Returns:
        TopItems: scores (B, k) fp32 and ids (B, k) int64.

    Raises:
        ValueError: ``k`` is not from 1 to S, or a score is NaN. See also `score_all`.
        TypeError, NotImplementedError: see `score_all`.

    Example:
        >>> import torch
        >>> from torchrec_qr import CompositionalEmbeddingCollection, CompositionalEmbeddingConfig, QuotientRemainder
        >>> from torchrec_qr.inference import top_items
        >>> def rows_of(*values):
        ...     return lambda weight: weight.data.copy_(torch.tensor(values).unsqueeze(1))
        >>> ec = CompositionalEmbeddingCollection(tables=[
        ...     CompositionalEmbeddingConfig(name="t_item", feature_names=["item"], num_embeddings=6, embedding_dim=4,
        ...         partitions=QuotientRemainder(num_collisions=2), init_fn=[rows_of(1., 2., 3.), rows_of(1., 1.)])])
        >>> top_items(ec, "t_item", torch.tensor([[1., 0., 0., 0.]]), k=3)
        TopItems(scores=tensor([[3., 3., 2.]]), ids=tensor([[2, 5, 1]]))
    """
    num_ids, users = _checked(collection, table, user_vectors)
    if not isinstance(k, int) or not 1 <= k <= num_ids:
        raise ValueError(f"table {table!r}: k={k!r}; allowed: an integer from 1 to {num_ids}, the number of ids")
    best = BestScores(len(users), k, users.device)
    for first, scores in score_blocks(collection, table, users, num_ids):
        if not best.add(first, scores):
            last = first + scores.shape[1] - 1
            raise ValueError(f"table {table!r}: a score of ids {first} to {last} is NaN; allowed: numbers")
    return TopItems(best.scores, best.ids)


def _checked(collection: Collection, table: str, user_vectors: Tensor) -> tuple[int, Tensor]:
    """Returns S, and the user vectors as fp32."""
    own, config = table_of(collection, table)
    if own.layout.hash_seed is not None:
        raise NotImplementedError(
            f"table {table!r}: scores of all items are not supported with id_hash, whose ids have no end; "
            "allowed: those of given ids, user_vectors @ materialize(collection, table, ids).T"
        )
    if not isinstance(user_vectors, Tensor) or not user_vectors.is_floating_point():
        given = user_vectors.dtype if isinstance(user_vectors, Tensor) else type(user_vectors).__name__
        raise TypeError(f"table {table!r}: user_vectors are {given}; allowed: a tensor of floats")
    shape = tuple(user_vectors.shape)
    if len(shape) != 2 or shape[1] != config.embedding_dim:
        raise ValueError(f"table {table!r}: user_vectors have shape {shape}; allowed: (B, {config.embedding_dim})")
    if user_vectors.device != collection.device:
        raise ValueError(
            f"table {table!r}: user_vectors are on {user_vectors.device}; allowed: {collection.device}, the device of "
            "the collection"
        )
    return config.num_embeddings, user_vectors.float()
