"""The page on compressing takes a model of two full tables as given, which has no memory yet."""

import torch
from page_models import full
from torchrec import EmbeddingBagCollection
from torchrec.models.dlrm import DLRM

model = DLRM(
    EmbeddingBagCollection(tables=[full("user", 1_000_000, 64), full("geo", 5_000, 64)], device=torch.device("meta")),
    dense_in_features=4,
    dense_arch_layer_sizes=[32, 64],
    over_arch_layer_sizes=[32, 1],
)
