"""The page on the planner takes a model, constraints and the YAML of a job as given."""

from pathlib import Path

import torch
from page_models import compositional
from torchrec.distributed.planner.types import ParameterConstraints

from torchrec_qr import CompositionalEmbeddingBagCollection

model = torch.nn.ModuleDict({"tables": CompositionalEmbeddingBagCollection(tables=[compositional("user", 100_000)])})
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
