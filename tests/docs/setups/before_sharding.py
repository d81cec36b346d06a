"""What docs/sharding.md takes as given: a model with a user and a country, its loss, and batches."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM
from torchrec.streamable import Pipelineable

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder


def make_model() -> DLRM:
    """Returns an unsharded model."""
    user = CompositionalEmbeddingBagConfig(
        name="t_user",
        feature_names=["user"],
        num_embeddings=100_000,
        embedding_dim=16,
        partitions=QuotientRemainder(num_collisions=4),
    )
    country = EmbeddingBagConfig(name="t_country", feature_names=["country"], num_embeddings=250, embedding_dim=16)
    ebc = CompositionalEmbeddingBagCollection(tables=[user, country], device=torch.device("meta"))
    return DLRM(ebc, dense_in_features=4, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1])


@dataclass
class Batch(Pipelineable):
    """Dense features (B, 4), ids of both features, and labels (B,)."""

    dense: Tensor
    ids: KeyedJaggedTensor
    labels: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Returns the batch on a device."""
        moved = (x.to(device, non_blocking=non_blocking) for x in (self.dense, self.ids, self.labels))
        return Batch(*moved)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory of a batch until a stream has read it."""
        for x in (self.dense, self.ids, self.labels):
            x.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """Returns the batch as it is, because it is on the CPU."""
        return self


class WithLoss(nn.Module):
    """Batch -> (loss, logits)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the loss and the logits of a batch."""
        logits = self.model(batch.dense, batch.ids).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits


def _batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(high, (8,), generator=generator) for high in (100_000, 250)]
    keyed = KeyedJaggedTensor(["user", "country"], torch.cat(ids), lengths=torch.ones(16, dtype=torch.int64))
    return Batch(torch.rand(8, 4, generator=generator), keyed, (ids[0] % 2).float())


model = make_model()
batches = [_batch(seed) for seed in range(3)]
