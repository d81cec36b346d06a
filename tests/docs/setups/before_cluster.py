"""The page on clusters takes a sharded model as given, and a store behind ``s3://``, in this process's memory."""

import fsspec
import torch
from fsspec.implementations.memory import MemoryFileSystem
from page_models import compositional
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_qr import CompositionalEmbeddingBagCollection
from torchrec_qr.distributed import get_default_sharders

fsspec.register_implementation("s3", MemoryFileSystem, clobber=True)
tables = torch.nn.ModuleDict({"tables": CompositionalEmbeddingBagCollection(tables=[compositional("user", 1_000)])})
apply_optimizer_in_backward(torch.optim.Adagrad, tables.parameters(), {"lr": 0.01})
model = DistributedModelParallel(tables, device=torch.device("cpu"), sharders=get_default_sharders())
