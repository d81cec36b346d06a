"""Initial values of partitions. The composed embedding has the variance of the full table that it replaces.

The full table is U(low, high), by default TorchRec's U(-1/√S, 1/√S), and σ² = (high - low)² / 12 is its variance, by
default 1/(3S). `CompositionalEmbeddingBagConfig.init` is one of three modes, by default ``unit``:

==========  ==============================  ==============================  ================================
operation   ``"unit"``                      ``"identity"``                  ``"balanced"``
==========  ==============================  ==============================  ================================
mult        main: the full table;           main: the full table;           all: U(-b, b),
            others: U(-√3, √3)              others: 1 + N(0, 0.01²)         b = √3 · (σ²)^(1/2K)
add         as ``"identity"``               main: the full table;           all: U(-b, b), b = √(3σ²/K)
                                            others: N(0, (0.01 σ)²)
concat      all: the full table, in all modes
path        partition 0: the full table; MLPs: nn.Linear's, the last layer scaled so that outputs have variance σ²
==========  ==============================  ==============================  ================================

Under ``identity`` a table starts as the hashing trick over its main partition, and training separates its ids. Under
``unit`` and ``balanced`` ids that share a row start uncorrelated. The gradient of one moves the embedding of the other
by a factor of random size and sign per column. Under ``balanced`` these factors are small. At one learning rate the
steps of an embedding are then about b times those under ``unit``. docs/quality.md has the quality of models by mode.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig

from torchrec_qr.configs import CompositionalConfig, CompositionalEmbeddingBagConfig

_NOISE = 0.01
# Draw in fp32 and round, because drawing in bf16 is biased. Draw so few scalars at a time, because a shard may fill the
# memory.
_CHUNK = 1 << 18


def partition_configs(config: CompositionalConfig) -> list[EmbeddingBagConfig] | list[EmbeddingConfig]:
    """Returns one plain TorchRec config per partition, ``<table>.partition_<j>``, with its rows, columns and init.

    The ``init_fn`` of each draws rows independently, so that it may fill a shard of them.

    Args:
        config (CompositionalConfig): the table.

    Example:
        >>> from torchrec_qr import CompositionalEmbeddingBagConfig, QuotientRemainder
        >>> config = CompositionalEmbeddingBagConfig(name="t", num_embeddings=100, embedding_dim=8,
        ...     feature_names=["f"], partitions=QuotientRemainder(num_collisions=4))
        >>> [(p.name, p.num_embeddings, p.embedding_dim) for p in partition_configs(config)]
        [('t.partition_0', 25, 8), ('t.partition_1', 4, 8)]
    """
    make: Callable[..., Any] = EmbeddingConfig
    if isinstance(config, CompositionalEmbeddingBagConfig):
        make = partial(EmbeddingBagConfig, pooling=config.pooling)
    return [
        make(
            name=f"{config.name}.partition_{j}",
            num_embeddings=rows,
            embedding_dim=config.partition_columns[j],
            data_type=config.partition_data_types[j],
            feature_names=list(config.feature_names),
            init_fn=_init_fn(config, j),
        )
        for j, rows in enumerate(config.bound_partitions.sizes)
    ]


def _init_fn(config: CompositionalConfig, j: int) -> Callable[[Tensor], Tensor | None]:
    given = config.given_init_fn
    if isinstance(given, Sequence):
        return given[j]
    return given or partial(init_partition, config, j)


@torch.no_grad()
def init_partition(config: CompositionalConfig, j: int, weight: Tensor) -> Tensor:
    """Fills ``weight``, any number of rows of partition j, in place by ``config.init``, and returns it."""
    if weight.numel() == 0:
        return weight  # the rank has no shard of the partition
    # A rank's column shards of different widths are flat. Every scalar then counts as a row.
    for chunk in weight.split(max(1, _CHUNK * weight.shape[0] // weight.numel())):
        if config.operation == "path" and j > 0:
            chunk.copy_(_mlps(config, chunk.shape[0], weight.device))
        else:
            chunk.copy_(_fill(config, j, torch.empty(chunk.shape, dtype=torch.float32, device=weight.device)))
    return weight


def _fill(config: CompositionalConfig, j: int, out: Tensor) -> Tensor:
    low, high, k = config.get_weight_init_min(), config.get_weight_init_max(), config.num_partitions
    sigma = (high - low) / math.sqrt(12)
    elementwise = config.operation in ("mult", "add")
    if elementwise and config.init == "balanced":
        variance = sigma ** (2 / k) if config.operation == "mult" else sigma**2 / k
        bound = math.sqrt(3 * variance)
        return out.uniform_(-bound, bound)
    if elementwise and j != config.base_partition:
        if config.operation == "add":
            return out.normal_(0, _NOISE * sigma)
        return out.normal_(1, _NOISE) if config.init == "identity" else out.uniform_(-math.sqrt(3), math.sqrt(3))
    return out.uniform_(low, high)


def _mlps(config: CompositionalConfig, classes: int, device: torch.device) -> Tensor:
    """Returns (classes, columns): one flattened MLP a row, as `torchrec_qr.ops.path` reads it."""
    dim, hidden = config.embedding_dim, config.path_hidden
    sigma2 = (config.get_weight_init_max() - config.get_weight_init_min()) ** 2 / 12

    def linear(fan_in: int, fan_out: int, variance: float) -> list[Tensor]:
        bound = math.sqrt(3 * variance)
        shapes = (fan_out * fan_in, fan_out)
        return [torch.empty(classes, n, device=device).uniform_(-bound, bound) for n in shapes]

    # nn.Linear draws weights and biases from U(-1/√fan_in, 1/√fan_in), whose variance is 1 / (3 fan_in). A last layer
    # of variance v over inputs of second moment q has outputs of variance fan_in·v·q + v.
    if hidden is None:
        return torch.cat(linear(dim, dim, sigma2 / (dim * sigma2 + 1)), dim=1)
    moment = _activation_moment(config.path_activation, sigma2 / 3, 1 / (3 * dim))
    return torch.cat(linear(dim, hidden, 1 / (3 * dim)) + linear(hidden, dim, sigma2 / (hidden * moment + 1)), dim=1)


def _activation_moment(activation: str, weighted_variance: float, bias_variance: float) -> float:
    """Returns E φ(z)² by quadrature: z = g + b, g ~ N(0, weighted_variance), b uniform of variance bias_variance."""
    bias, bias_mass = np.polynomial.legendre.leggauss(64)
    noise, noise_mass = np.polynomial.hermite_e.hermegauss(64)
    z = bias[:, None] * math.sqrt(3 * bias_variance) + noise[None, :] * math.sqrt(weighted_variance)
    phi = np.tanh(z) if activation == "tanh" else np.maximum(z, 0)
    mass = bias_mass[:, None] * noise_mass[None, :]
    return float((mass * phi**2).sum() / mass.sum())
