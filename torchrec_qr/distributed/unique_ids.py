"""Ids of a batch, each once a feature."""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def unique_ids(features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Tensor]:
    """Returns the unique ids of each feature, ascending, in its first bag; and (N,) where each id of the batch is.

    Ranks send no more ids than are left. So the host needs to have their numbers, for which TorchRec waits on a GPU: on
    the stream of the input dist, and once for all features.

    Args:
        features (KeyedJaggedTensor): the batch; its weights are left out.

    Example:
        >>> batch = KeyedJaggedTensor(["f", "g"], torch.tensor([7, 3, 7, 7]), lengths=torch.tensor([1, 2, 1, 0]))
        >>> unique, numbers = unique_ids(batch)
        >>> unique.values().tolist(), unique.lengths().tolist(), numbers.tolist()
        ([3, 7, 7], [2, 0, 1, 0], [1, 0, 1, 2])
    """
    unique = _on_host if features.values().device.type == "cpu" else _on_device
    ids, counts, numbers = unique(features)
    lengths = torch.zeros_like(features.lengths()).view(len(counts), -1)
    lengths[:, :1] = counts.unsqueeze(1)
    in_first_bags = KeyedJaggedTensor(features.keys(), ids, lengths=lengths.view(-1), stride=features.stride())
    length_per_key = in_first_bags.length_per_key()
    left = KeyedJaggedTensor(
        features.keys(),
        ids[: sum(length_per_key)],
        lengths=lengths.view(-1),
        stride=features.stride(),
        length_per_key=length_per_key,
    )
    return left, numbers


def _on_host(features: KeyedJaggedTensor) -> tuple[Tensor, Tensor, Tensor]:
    uniques, numbers, first = [], [], 0
    for ids in features.values().split(features.length_per_key()):
        unique, number = ids.unique(return_inverse=True)
        uniques.append(unique)
        numbers.append(number + first)
        first += len(unique)
    return torch.cat(uniques), torch.tensor([len(unique) for unique in uniques]), torch.cat(numbers)


def _on_device(features: KeyedJaggedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_on_host`, without a wait: there are as many ids as in the batch, and those past the unique ones are 0."""
    ids, bags = features.values(), features.stride()
    ends = features.offsets()[bags :: max(bags, 1)].contiguous()
    feature = torch.bucketize(torch.arange(len(ids), device=ids.device), ends, right=True, out_int32=True)
    # Sort by id, then by feature, because ids that no table has make no key of both: the lookup names them later.
    by_id, order = ids.sort(stable=True)
    feature, by_feature = feature[order].sort(stable=True)
    in_order, order = by_id[by_feature], order[by_feature]
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    is_first[1:] = (in_order[1:] != in_order[:-1]) | (feature[1:] != feature[:-1])
    number = is_first.cumsum(0) - 1
    unique = torch.zeros_like(in_order).scatter_(0, number, in_order)
    counts = number.new_zeros(len(features.keys())).scatter_add_(0, feature.long(), is_first.long())
    return unique, counts, torch.empty_like(number).scatter_(0, order, number)
