"""TorchRec's models over a collection, and two of the kinds that users write, with few columns."""

from typing import Any

from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection
from torchrec.modules.mlp import MLP

D, DENSE = 8, 3


def dlrm(collection: Any) -> nn.Module:
    return DLRM(collection, DENSE, [16, D], [16, 1])


def dlrm_dcn(collection: Any) -> nn.Module:
    return DLRM_DCN(collection, DENSE, [16, D], [16, 1], dcn_num_layers=2, dcn_low_rank_dim=4)


def dlrm_projection(collection: Any) -> nn.Module:
    return DLRM_Projection(
        embedding_bag_collection=collection,
        dense_in_features=DENSE,
        dense_arch_layer_sizes=[16, D],
        over_arch_layer_sizes=[16, 1],
        interaction_branch1_layer_sizes=[16, 2 * D],
        interaction_branch2_layer_sizes=[16, 2 * D],
    )


def deepfm(collection: Any) -> nn.Module:
    return SimpleDeepFMNN(DENSE, collection, hidden_layer_size=16, deep_fm_dimension=4)


class TwoTower(nn.Module):
    """The product of a user's and an item's vector, each an MLP over a collection of its own."""

    def __init__(self, users: Any, items: Any) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"user": nn.Sequential(), "item": nn.Sequential()})
        for name, collection in (("user", users), ("item", items)):
            columns = sum(c.embedding_dim * len(c.feature_names) for c in collection.embedding_bag_configs())
            self.towers[name].add_module("collection", collection)
            self.towers[name].add_module("mlp", MLP(columns, [16, D]))

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        user, item = (tower.mlp(tower.collection(sparse).values()) for tower in self.towers.values())
        return (user * item).sum(1, keepdim=True)


class NextItem(nn.Module):
    """Scores a target after a history of items, whose rows a recurrent layer reads."""

    def __init__(self, collection: Any) -> None:
        super().__init__()
        self.collection = collection
        self.reader = nn.GRU(D, D, batch_first=True)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        found = self.collection(sparse)
        history = found["history"].to_padded_dense(4)
        state = self.reader(history)[1][0]
        return (state * found["target"].values()).sum(1, keepdim=True)
