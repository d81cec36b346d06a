"""What docs/cluster.md takes as given: a sharded model, and a store behind ``s3://``, in this process's memory."""

import fsspec
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.distributed import get_default_sharders

fsspec.register_implementation("s3", MemoryFileSystem, clobber=True)
table = CompositionalEmbeddingBagConfig(
    name="t_user",
    feature_names=["user"],
    num_embeddings=1_000,
    embedding_dim=16,
    partitions=QuotientRemainder(num_collisions=4),
)
tables = torch.nn.ModuleDict({"tables": CompositionalEmbeddingBagCollection(tables=[table])})
apply_optimizer_in_backward(torch.optim.Adagrad, tables.parameters(), {"lr": 0.01})
model = DistributedModelParallel(tables, device=torch.device("cpu"), sharders=get_default_sharders())
