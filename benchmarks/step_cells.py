"""The cells of the step benchmark: what is trained, and on which batches."""

from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec import KeyedJaggedTensor

LR, EPS = 0.01, 1e-8
OPTIMIZERS = {"sgd": EmbOptimType.EXACT_SGD, "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}


@dataclass(frozen=True)
class Tables:
    """Equal tables, one per feature, and how they are sharded and stepped. ``m``: ids that share a row."""

    num_ids: int
    dim: int
    num_features: int
    sharding: str
    optimizer: str

    @property
    def features(self) -> list[str]:
        return [f"f{i}" for i in range(self.num_features)]

    @property
    def fused_params(self) -> dict[str, object]:
        return {"optimizer": OPTIMIZERS[self.optimizer], "learning_rate": LR, "eps": EPS}


def batch(tables: Tables, hot: int, bags: int, rank: int, number: int) -> Tensor:
    """(F·B·hot,) ids of a rank's batch, uniform, feature after feature; the same on every rank that asks for it."""
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randint(0, tables.num_ids, (tables.num_features * bags * hot,), generator=generator)


def upstream(tables: Tables, bags: int, rank: int) -> Tensor:
    """(B, F·D), the gradient of a rank's output."""
    generator = torch.Generator().manual_seed(77 + rank)
    return torch.rand(bags, tables.num_features * tables.dim, generator=generator)


def kjt(keys: list[str], ids: Tensor, bags: int, hot: int) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=keys, values=ids, lengths=torch.full((len(keys) * bags,), hot, dtype=torch.int64))
