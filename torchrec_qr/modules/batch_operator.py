"""The features of a batch that a lookup reads, as one operator of ``torch.library``.

A compiler sees neither the policies for ids, which depend on the ids, nor the number of ids of each feature.
"""

import json
from functools import lru_cache

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.ids import IdSpace, arranged
from torchrec_qr.modules.feature_batch import in_range
from torchrec_qr.ops.description import described


@torch.library.custom_op("torchrec_qr::batch_of_spaces", mutates_args=(), device_types=("cpu", "cuda"))
def batch_of_spaces(
    ids: Tensor,
    lengths: Tensor,
    weights: list[Tensor],
    keys: str,
    bags: int,
    spaces: str,
    tables: str,
    weighted: bool,
    pooled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the features of id spaces, in order, as a lookup takes them.

    Args:
        ids (Tensor): (N,) of a batch, feature after feature.
        lengths (Tensor): (F·B,) of the batch.
        weights (list[Tensor]): of the tables.
        keys (str): of the batch, a line each.
        bags (int): B.
        spaces (str): the id spaces, as JSON.
        tables (str): the description of the lookup's tables.
        weighted (bool): whether the lookup has weights of ids.
        pooled (bool): whether the lookup pools.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor]: ids (n,) in range; offsets of bags if ``pooled``, else of features;
            lengths of bags; and the positions (n,) of the ids in the batch if ``weighted``, else nothing.

    Raises:
        As `torchrec_qr.ids.arranged` and `torchrec_qr.modules.feature_batch.in_range`.
    """
    of_batch = torch.arange(ids.numel(), device=ids.device) if weighted else None
    features = KeyedJaggedTensor(keys=keys.split("\n"), values=ids, lengths=lengths, weights=of_batch, stride=bags)
    own = _spaces(spaces)
    features = in_range(arranged(features, own, weighted, pooled), own, [(described(tables), weights)])
    found, own_lengths = features.values(), features.lengths()
    offsets = features.offsets() if pooled else torch.tensor(features.offset_per_key())
    return (
        # An operator returns none of its arguments.
        found.clone() if found is ids else found,
        offsets,
        own_lengths.clone() if own_lengths is lengths else own_lengths,
        ids.new_empty(0, dtype=torch.int64) if of_batch is None else features.weights().clone(),
    )


@batch_of_spaces.register_fake
def _(
    ids: Tensor,
    lengths: Tensor,
    weights: list[Tensor],
    keys: str,
    bags: int,
    spaces: str,
    tables: str,
    weighted: bool,
    pooled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = [space.feature for space in _spaces(spaces)]
    # Only the ids of all features are as many as those of the batch.
    n = ids.shape[0] if keys.split("\n") == features else torch.library.get_ctx().new_dynamic_size()
    return (
        ids.new_empty(n, dtype=torch.int64),
        lengths.new_empty(len(features) * bags + 1)
        if pooled
        else torch.empty(len(features) + 1, dtype=torch.int64, device="cpu"),
        lengths.new_empty(len(features) * bags),
        ids.new_empty(n if weighted else 0, dtype=torch.int64),
    )


@lru_cache(maxsize=1024)
def _spaces(text: str) -> list[IdSpace]:
    return [IdSpace(*fields) for fields in json.loads(text)]
