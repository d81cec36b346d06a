"""Batches with a number of bags for each feature: TorchRec's variable batch per feature.

Samples share bags. Sample b has bag ``inverse_indices[f, b]`` of feature f. Features with fewer bags get empty ones
behind their own, so that a lookup has (B, ΣD) with the bags of all features. Samples then take theirs by index.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torchrec.modules.embedding_modules import process_pooled_embeddings
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.late_errors import check_later


def with_one_number_of_bags(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Returns a batch in which each feature has the bags of the feature with most, without inverse indices.

    A batch that has one number of bags is returned as it is. Ids and their weights are not copied.

    Args:
        features (KeyedJaggedTensor): the batch.

    Raises:
        ValueError: features differ in their numbers of bags, and the batch has no inverse indices.

    Example:
        >>> import torch
        >>> from torchrec import KeyedJaggedTensor
        >>> from torchrec_qr.variable_batches import with_one_number_of_bags
        >>> batch = KeyedJaggedTensor(["f", "g"], torch.tensor([5, 6, 7]), lengths=torch.tensor([1, 2, 0]),
        ...     stride_per_key_per_rank=[[1], [2]], inverse_indices=(["f", "g"], torch.tensor([[0, 0], [0, 1]])))
        >>> with_one_number_of_bags(batch).lengths().tolist()
        [1, 0, 2, 0]
    """
    if not features.variable_stride_per_key():
        return features
    numbers = features.stride_per_key()
    if len(set(numbers)) > 1 and features.inverse_indices_or_none() is None:
        raise ValueError(
            f"features {features.keys()}: {numbers} bags and no inverse indices; allowed: one number of bags for all, "
            "or inverse indices"
        )
    most = max(numbers)
    of_features = features.lengths().split(numbers)
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=torch.cat([functional.pad(lengths, (0, most - len(lengths))) for lengths in of_features]),
        stride=most,
        length_per_key=features.length_per_key(),
    )


def bags_of_samples(features: KeyedJaggedTensor, names: Sequence[str]) -> Tensor | None:
    """Returns the bag that each sample has of each feature, or None if the batch has no inverse indices.

    On CUDA the host must not wait for the device: a later call raises the IndexError.

    Args:
        features (KeyedJaggedTensor): the batch.
        names (Sequence[str]): the features, with repetitions.

    Returns:
        Tensor | None: (len(names), samples).

    Raises:
        KeyError: the inverse indices lack a feature.
        ValueError: the inverse indices have not a row for each of their features.
        IndexError: a sample has a bag that the feature has not.
    """
    found = features.inverse_indices_or_none()
    if found is None:
        return None
    of, indices = found
    if indices.dim() != 2 or len(indices) != len(of):
        raise ValueError(
            f"inverse indices of {of} have the shape {tuple(indices.shape)}; allowed: ({len(of)}, samples)"
        )
    row_of = {feature: i for i, feature in enumerate(of)}
    if lacking := [name for name in names if name not in row_of]:
        raise KeyError(f"feature {lacking[0]!r}: the batch has inverse indices of {of} alone")
    number_of = dict(zip(features.keys(), features.stride_per_key(), strict=True))
    numbers = [number_of[name] for name in names]
    # Stack rows, because an index that is copied to a GPU makes the host wait.
    own = torch.stack([indices[row_of[name]] for name in names])
    if not own.numel() or own.is_meta:
        return own

    def check(extremes: Tensor) -> None:
        for name, number, low, high in zip(names, numbers, *extremes.tolist(), strict=True):
            if low < 0 or high >= number:
                raise IndexError(
                    f"feature {name!r}: inverse index {low if low < 0 else high} is outside [0, {number}), its bags"
                )

    extremes = torch.stack(own.aminmax(dim=1))
    if not own.is_cuda:
        check(extremes)
        return own
    check_later(extremes, check)
    return own.clamp(0, max(*numbers, 1) - 1)


def samples_of(pooled: Tensor, dims: Sequence[int], bags: Tensor) -> Tensor:
    """Returns the samples of a batch: out[b, f] = pooled[bags[f, b], f].

    Args:
        pooled (Tensor): (B, ΣD) of the bags.
        dims (Sequence[int]): D of each feature.
        bags (Tensor): (F, samples): see `bags_of_samples`.

    Returns:
        Tensor: (samples, ΣD).
    """
    if not bags.numel():
        return pooled[:0]
    out: Tensor = process_pooled_embeddings(list(pooled.split(list(dims), dim=1)), bags)
    return out
