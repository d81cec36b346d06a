"""The page on sharding takes a model with a user and a country, and batches, as given."""

import torch
from page_models import compressed_dlrm
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM


def make_model() -> DLRM:
    """Returns an unsharded model."""
    return compressed_dlrm(users=100_000, device="meta")


def _batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(high, (8,), generator=generator) for high in (100_000, 250)]
    keyed = KeyedJaggedTensor(["user", "country"], torch.cat(ids), lengths=torch.ones(16, dtype=torch.int64))
    return Batch(torch.rand(8, 4, generator=generator), keyed, (ids[0] % 2).float())


model = make_model()
batches = [_batch(seed) for seed in range(3)]
