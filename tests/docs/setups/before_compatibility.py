"""What docs/compatibility.md takes as given: a model with batches and a loss, on two hosts of two gloo ranks each."""

import os

import groups_of_ranks
import torch
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder

os.environ["LOCAL_WORLD_SIZE"] = "2"
# TorchRec's class, less its assertion of CUDA.
DMPCollection = groups_of_ranks.Groups

user = CompositionalEmbeddingBagConfig(
    name="t_user",
    feature_names=["user"],
    num_embeddings=10_000,
    embedding_dim=16,
    partitions=QuotientRemainder(num_collisions=4),
)
country = EmbeddingBagConfig(name="t_country", feature_names=["country"], num_embeddings=250, embedding_dim=16)
collection = CompositionalEmbeddingBagCollection(tables=[user, country], device=torch.device("meta"))
model = DLRM(collection, dense_in_features=4, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1])
apply_optimizer_in_backward(RowWiseAdagrad, model.sparse_arch.parameters(), {"lr": 0.05})
for layers in (model.dense_arch, model.over_arch):
    layers.to_empty(device="cpu")
    for p in layers.parameters():
        nn.init.constant_(p, 0.1)


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits.squeeze(1), labels)


def make_batch(step: int) -> tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]:
    ids = torch.tensor([step, 9_999 - step, 7, 249])
    features = KeyedJaggedTensor(keys=["user", "country"], values=ids, lengths=torch.ones(4, dtype=torch.int64))
    return torch.full((2, 4), 0.5), features, torch.tensor([0.0, 1.0])


batches = [make_batch(step) for step in range(11)]
