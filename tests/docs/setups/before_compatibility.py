"""The page on TorchRec's parts takes a model, batches and a loss as given, on two hosts of two gloo ranks each."""

import os

import groups_of_ranks
import torch
from page_models import compressed_dlrm
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

os.environ["LOCAL_WORLD_SIZE"] = "2"
# TorchRec's class, less its assertion of CUDA.
DMPCollection = groups_of_ranks.Groups

model = compressed_dlrm(users=10_000, device="meta")
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
