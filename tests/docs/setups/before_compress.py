import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DLRM


def table(name: str, rows: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=f"t_{name}", feature_names=[name], num_embeddings=rows, embedding_dim=64)


model = DLRM(
    EmbeddingBagCollection(tables=[table("user", 1_000_000), table("geo", 5_000)], device=torch.device("meta")),
    dense_in_features=4,
    dense_arch_layer_sizes=[32, 64],
    over_arch_layer_sizes=[32, 1],
)
