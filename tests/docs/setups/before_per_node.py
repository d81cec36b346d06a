import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder

sharder = CompositionalEmbeddingBagCollectionSharder(
    fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.01}
)
tables = [
    CompositionalEmbeddingBagConfig(
        name=f"t_{feature}",
        feature_names=[feature],
        num_embeddings=1000,
        embedding_dim=16,
        partitions=QuotientRemainder(num_collisions=4),
    )
    for feature in ("user", "item")
]
collection = CompositionalEmbeddingBagCollection(tables=tables, device=torch.device("meta"))
