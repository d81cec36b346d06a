"""The page on copies per node takes a collection of two tables and its sharder as given."""

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from page_models import compositional

from torchrec_qr import CompositionalEmbeddingBagCollection
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder

sharder = CompositionalEmbeddingBagCollectionSharder(
    fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.01}
)
tables = [compositional("user", 1_000), compositional("item", 1_000)]
collection = CompositionalEmbeddingBagCollection(tables=tables, device=torch.device("meta"))
