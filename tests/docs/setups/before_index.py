from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder

ids_of_users = {"name": "t_user", "feature_names": ["user"], "num_embeddings": 1000, "embedding_dim": 16}
country = EmbeddingBagConfig(name="t_country", feature_names=["country"], num_embeddings=250, embedding_dim=16)
