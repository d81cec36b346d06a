"""The models of the job: TorchRec's DLRM family and DeepFM, and the paper's DCN, on either kind of collection."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection
from torchrec.modules.crossnet import VectorCrossNet
from torchrec.modules.mlp import MLP

from launch.sections import ModelConfig
from torchrec_qr import CompositionalEmbeddingBagCollection

Collection = Callable[..., nn.Module]
_META = torch.device("meta")


class DCN(nn.Module):
    """Deep & cross network: vector cross layers beside a deep tower, over dense features and all embeddings.

    x_0 = (dense, embeddings); x_{l+1} = x_0 · (w_l · x_l) + b_l + x_l; logit = w · (x_L, MLP(x_0)) + b. The second
    model of the paper (arXiv:1909.02107, section 5): 6 cross layers, a deep tower of 512-256-64.

    Args:
        embedding_bag_collection (nn.Module): of any kind.
        dense_in_features (int): number of dense features.
        cross_layers (int): L.
        deep_layer_sizes (Sequence[int]): of the deep tower.

    Shapes: dense (B, dense_in_features), ids of F features; logits (B, 1).
    """

    def __init__(
        self,
        embedding_bag_collection: nn.Module,
        dense_in_features: int,
        cross_layers: int,
        deep_layer_sizes: Sequence[int],
    ) -> None:
        super().__init__()
        configs = embedding_bag_collection.embedding_bag_configs()  # type: ignore[operator]
        self.embedding_bag_collection = embedding_bag_collection
        self._features: list[str] = [feature for config in configs for feature in config.feature_names]
        width = dense_in_features + sum(config.embedding_dim for config in configs for _ in config.feature_names)
        self.cross = VectorCrossNet(width, cross_layers)
        self.deep = MLP(width, list(deep_layer_sizes), bias=True, activation="relu")
        self.logit = nn.Linear(width + deep_layer_sizes[-1], 1)

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        embeddings = KeyedTensor.regroup([self.embedding_bag_collection(sparse_features)], [self._features])[0]
        x = torch.cat([dense_features, embeddings], dim=1)
        return self.logit(torch.cat([self.cross(x), self.deep(x)], dim=1))


class DeepFM(nn.Module):
    """TorchRec's SimpleDeepFMNN without the sigmoid that it ends in: (dense, ids) → logits (B, 1)."""

    def __init__(
        self, embedding_bag_collection: nn.Module, dense_in_features: int, hidden: int, deep_fm_dimension: int
    ) -> None:
        super().__init__()
        self.deepfm = SimpleDeepFMNN(dense_in_features, embedding_bag_collection, hidden, deep_fm_dimension)  # type: ignore[arg-type]
        head = self.deepfm.over_arch.model
        assert isinstance(head, nn.Sequential)
        assert isinstance(head[-1], nn.Sigmoid)
        head[-1] = nn.Identity()

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        return self.deepfm(dense_features, sparse_features)


def build_model(
    config: ModelConfig,
    tables: list[EmbeddingBagConfig],
    device: torch.device,
    collection: Collection = CompositionalEmbeddingBagCollection,
    embeddings_on: torch.device = _META,
) -> nn.Module:
    """Returns the model of ``config``, (dense, ids) → logits (B, 1).

    The embeddings are on the meta device, to be sharded, or on ``embeddings_on``; the dense layers on ``device``.
    ``collection(tables=…, device=…)`` makes the collection of the tables.
    """
    ebc = collection(tables=tables, device=embeddings_on)
    dlrm: dict[str, Any] = {
        "embedding_bag_collection": ebc,
        "dense_in_features": config.dense_in_features,
        "dense_arch_layer_sizes": list(config.bottom_mlp),
        "over_arch_layer_sizes": [*config.top_mlp, 1],
    }
    with device:  # not all of TorchRec's layers take one
        match config.interaction:
            case "dot":
                return DLRM(**dlrm)
            case "dcn_v2":
                return DLRM_DCN(**dlrm, dcn_num_layers=config.cross_layers, dcn_low_rank_dim=config.cross_rank)
            case "projection":
                branches: dict[str, Any] = {
                    f"interaction_branch{i}_layer_sizes": list(config.projection_mlp) for i in (1, 2)
                }
                return DLRM_Projection(**dlrm, **branches)
            case "dcn":
                return DCN(ebc, config.dense_in_features, config.cross_layers, config.top_mlp)
            case "deepfm":
                return DeepFM(ebc, config.dense_in_features, *config.top_mlp)
