"""A model of full tables that has been trained, which README compresses and serves."""

from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DLRM

tables = [
    EmbeddingBagConfig(name="t_user", feature_names=["user"], num_embeddings=10_000, embedding_dim=16),
    EmbeddingBagConfig(name="t_country", feature_names=["country"], num_embeddings=250, embedding_dim=16),
]
collection = EmbeddingBagCollection(tables=tables)
trained = DLRM(collection, dense_in_features=4, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1])
