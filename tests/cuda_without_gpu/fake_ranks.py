"""A rank of several whose collectives move nothing, with DistributedDataParallel and TorchRec on fake tensors.

Only what neither can do without real memory is replaced here:

- modules without initial values are made at once;
- tensors of a state dict that are told of by all ranks are not made;
- DDP compares its parameters with other ranks', logs times of CUDA events, and reads which parameters were used;
- FBGEMM's kernels of plain tables have no form for fake tensors, nor has the permutation of column shards.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _distributed_c10d as c10d
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp
from torchrec.distributed.embedding_kernel import BaseEmbedding, get_state_dict
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.modules import table

WORLD_SIZE, LOCAL_WORLD_SIZE = 4, 2


def start() -> None:
    """Makes the process the first of four ranks on two hosts."""
    os.environ.update(RANK="0", WORLD_SIZE=str(WORLD_SIZE), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(LOCAL_WORLD_SIZE))
    # Give it a name of its own, because TorchRec leaves out half of its constructor under the name "fake".
    dist.Backend.register_backend(
        "idle",
        lambda common, options: c10d.FakeProcessGroup._create_internal(common.group_rank, common.group_size, options),
        extended_api=True,
        devices=["cpu", "cuda"],
    )
    dist.init_process_group("idle", store=dist.HashStore(), rank=0, world_size=WORLD_SIZE)
    _replace_in_ddp()
    _replace_in_fbgemm()
    ShardedTensor._init_from_local_shards = lambda *args, **kwargs: None  # type: ignore[method-assign]
    # torch's own makes a module on no device and swaps its tensors, which fake ones refuse.
    table.skip_init = lambda module, *args, **kwargs: module(*args, **kwargs)


def _replace_in_ddp() -> None:
    construct = DistributedDataParallel.__init__

    def dynamic(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        # A static graph reads, on the host, which parameters its first backward used.
        construct(self, *args, **{**kwargs, "static_graph": False})

    DistributedDataParallel.__init__ = dynamic  # type: ignore[method-assign]
    ddp._verify_param_shape_across_processes = lambda *args, **kwargs: None
    reducer: Any = c10d.Reducer
    reducer._rebuild_buckets = lambda self: False
    # It counts iterations, of which some are timed by events of CUDA.
    reducer.prepare_for_forward = lambda self: None
    logger: Any = c10d.Logger
    logger.set_runtime_stats_and_log = lambda self: None


def _replace_in_fbgemm() -> None:
    for lookup in (GroupedPooledEmbeddingsLookup, GroupedEmbeddingsLookup):
        pooled = lookup is GroupedPooledEmbeddingsLookup

        def create(self: Any, config: GroupedEmbeddingConfig, *args: Any, pooled: bool = pooled, **kwargs: Any) -> Any:
            device = next((a for a in args if isinstance(a, torch.device)), None)
            pg = next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
            return PlainKernel(config, pg, device, pooled)

        lookup._create_embedding_kernel = create  # type: ignore[method-assign]
    split = "permute_pooled_embs_auto_grad_split"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fbgemm::{split}", "AutogradCUDA"):
        _LIBRARY.impl(split, torch.ops.fbgemm.permute_pooled_embs_auto_grad.default, "AutogradCUDA")


_LIBRARY = torch.library.Library("fbgemm", "IMPL")


class PlainKernel(BaseEmbedding):
    """Takes the place of FBGEMM's: the same shapes, by operations of PyTorch."""

    def __init__(
        self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None, device: torch.device | None, pooled: bool
    ) -> None:
        super().__init__()
        self._config, self._pg, self._pooled = config, pg, pooled
        tables = config.embedding_tables
        self.weights = nn.ParameterList(torch.zeros(t.local_rows, t.local_cols, device=device) for t in tables)

    @property
    def config(self) -> GroupedEmbeddingConfig:
        return self._config

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        weights = [w.detach() for w in self.weights]
        return get_state_dict(self._config.embedding_tables, weights, self._pg, destination, prefix)

    def named_parameters_by_table(self) -> Any:
        return ((t.name, w) for t, w in zip(self._config.embedding_tables, self.weights, strict=True))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        starts, bags = features.offset_per_key(), features.offsets()
        weights = [w for t, w in zip(self._config.embedding_tables, self.weights, strict=True) for _ in t.feature_names]
        outputs: list[Tensor] = []
        for f, weight in enumerate(weights):
            rows = weight[features.values()[starts[f] : starts[f + 1]].long()]
            if not self._pooled:
                outputs.append(rows.reshape(-1))
                continue
            sizes = bags[f * features.stride() + 1 : (f + 1) * features.stride() + 1]
            bag_of = torch.bucketize(torch.arange(starts[f], starts[f + 1], device=rows.device), sizes, right=True)
            outputs.append(rows.new_zeros(features.stride(), rows.shape[1]).index_add(0, bag_of, rows))
        return torch.cat(outputs, dim=1 if self._pooled else 0)
