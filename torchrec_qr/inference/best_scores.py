"""The best scores of each user vector among those that have been seen, and their ids."""

import torch
from torch import Tensor

# Look at the largest score of so many ids first, because few groups have one of the best.
_GROUP = 64


class BestScores:
    """The k largest scores of B user vectors each, of scores that come block after block in the order of ids.

    Equal scores are in the order of ids. If fewer than k ids were seen, there are as many columns as ids.

    Args:
        count (int): B.
        k (int): at least 1.
        device (torch.device): the device of the scores.

    Attributes:
        scores (Tensor): (B, k) fp32, the largest first.
        ids (Tensor): (B, k) int64.

    Example:
        >>> best = BestScores(1, 2, torch.device("cpu"))
        >>> best.add(0, torch.tensor([[1.0, 3.0, 2.0]])), best.add(3, torch.tensor([[3.0, 0.0]]))
        (True, True)
        >>> best.scores.tolist(), best.ids.tolist()
        ([[3.0, 3.0]], [[1, 3]])
    """

    def __init__(self, count: int, k: int, device: torch.device) -> None:
        self._k = k
        self.scores = torch.empty(count, 0, device=device)
        self.ids = torch.empty(count, 0, dtype=torch.int64, device=device)
        self._users = torch.arange(count, device=device)

    def add(self, first: int, scores: Tensor) -> bool:
        """Adds scores (B, n) of the ids from ``first`` on, and returns False if one is NaN.

        Args:
            first (int): an id above all that were added before.
            scores (Tensor): (B, n) fp32.
        """
        n = scores.shape[1]
        size = max(1, min(_GROUP, n // self._k))
        whole = n // size * size
        return self._add_groups(first, scores[:, :whole], size) and (
            whole == n or self._add_groups(first + whole, scores[:, whole:], 1)
        )

    def _add_groups(self, first: int, scores: Tensor, size: int) -> bool:
        """Adds groups of ``size`` ids each, of which there are k, or all ids are groups of their own."""
        largest = _largest_of_groups(scores, size)
        if largest.isnan().any():
            return False
        # As many groups as are wanted have a score of at least the bound, so that no smaller one is among the best.
        bound = largest.topk(min(self._k, largest.shape[1])).values[:, -1:]
        seen = self.scores.shape[1]
        if seen == self._k:
            # An equal score comes after those that were seen, because its id is larger.
            above_seen = torch.nextafter(self.scores[:, -1:], bound.new_full((), torch.inf))
            bound = torch.maximum(bound, above_seen)
        users, groups = (largest >= bound).nonzero(as_tuple=True)
        found = scores.unflatten(1, (-1, size))[users, groups]
        number, place = (found >= bound[users]).nonzero(as_tuple=True)
        if len(number) or seen < self._k:
            ids = first + groups[number] * size + place
            self._merge(users[number], found[number, place], ids, scores.shape[1])
        return True

    def _merge(self, users: Tensor, scores: Tensor, ids: Tensor, n: int) -> None:
        """Keeps the best of those that were kept and of some of n more, which are in the order of users and ids."""
        seen = self.scores.shape[1]
        users = torch.cat([self._users.repeat_interleave(seen), users])
        scores = torch.cat([self.scores.flatten(), scores])
        ids = torch.cat([self.ids.flatten(), ids])
        # Both sorts are stable, so that equal scores of a user stay in the order of ids.
        order = scores.argsort(descending=True, stable=True)
        order = order[users[order].argsort(stable=True)]
        first_of_user = torch.searchsorted(users[order], self._users)
        k = min(self._k, seen + n)
        kept = order[first_of_user.unsqueeze(1) + torch.arange(k, device=order.device)]
        self.scores, self.ids = scores[kept], ids[kept]


def _largest_of_groups(scores: Tensor, size: int) -> Tensor:
    """Returns (B, n / size), each the largest score of ``size`` consecutive ids."""
    if size == 1:
        return scores
    # Reduce in the order of memory, because the reverse takes ten times as long.
    if scores.stride(1) == 1:
        return scores.unflatten(1, (-1, size)).amax(2)
    return scores.T.unflatten(0, (-1, size)).amax(1).T
