"""What docs/planner.md takes as given: a model, constraints, and the YAML of a job."""

from pathlib import Path

import torch
from torchrec.distributed.planner.types import ParameterConstraints

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder

table = CompositionalEmbeddingBagConfig(
    name="t_user",
    feature_names=["user"],
    num_embeddings=100_000,
    embedding_dim=16,
    partitions=QuotientRemainder(num_collisions=4),
)
model = torch.nn.ModuleDict({"tables": CompositionalEmbeddingBagCollection(tables=[table])})
constraints = {"t_user": ParameterConstraints(sharding_types=["table_wise"])}
Path("job.yaml").write_text(
    """
tables:
  - name: t_user
    num_embeddings: 80_000_000
    embedding_dim: 128
    partitions: {kind: quotient_remainder, num_collisions: 4}
planner: {topology: 1x4, device: h100, batch_size: 2048}
optimizer: {sparse: {name: adagrad}}
"""
)
