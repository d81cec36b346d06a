"""The private names of TorchRec and torch that this package overrides, calls or reads.

If one were renamed, no call would fail: TorchRec would ignore an override or an attribute, and tables would not train.
So `require` looks up all names when `torchrec_qr.distributed` is imported.
"""

import inspect
from collections.abc import Iterable, Iterator
from importlib import metadata
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer
from torchrec.distributed.dist_data import KJTAllToAll
from torchrec.distributed.embedding import EmbeddingCollectionContext, ShardedEmbeddingCollection
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import group_tables
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext, ShardedEmbeddingBagCollection
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding_modules import (
    BaseManagedCollisionEmbeddingCollectionSharder,
    BaseShardedManagedCollisionEmbeddingCollection,
)
from torchrec.distributed.mc_modules import ShardedManagedCollisionCollection
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.model_tracker.model_delta_tracker import ModelDeltaTrackerTrec
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist
from torchrec.distributed.sharding.twrw_sharding import TwRwSparseFeaturesDist
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.distributed.train_pipeline.utils import _override_input_dist_forwards
from torchrec.distributed.types import Awaitable, ShardingEnv2D
from torchrec.distributed.utils import add_params_from_parameter_sharding
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import fuse_embedding_optimizer
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from torchrec.optim.keyed import KeyedOptimizerWrapper, OptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.quant.embedding_modules import _get_device, quantize_state_dict

from torchrec_qr.distributed.layout import DATA_PARALLEL
from torchrec_qr.distributed.sharding import POOLED_SHARDINGS, SEQUENCE_SHARDINGS


class Hook(NamedTuple):
    """Names that a class, function or module of TorchRec or torch must have.

    Args:
        owner (Any): the class, function or module.
        defined (tuple[str, ...]): attributes of the owner itself, such as methods.
        used (tuple[str, ...]): names in the owner's code: attributes of instances, and keys of dictionaries.
    """

    owner: Any
    defined: tuple[str, ...] = ()
    used: tuple[str, ...] = ()


_COLLECTION = (
    *("_lookups", "_env", "_device", "module_sharding_plan", "CUSTOMIZED_KERNEL"),
    *("_initialize_torch_state", "reset_parameters"),
)

HOOKS = (
    # TorchRec's customized kernel.
    Hook(add_params_from_parameter_sharding, used=("get_additional_fused_params", "CUSTOMIZED_KERNEL")),
    Hook(group_tables, used=("fused_params", "compute_kernel")),
    Hook(ShardedEmbeddingTable, used=("local_metadata", "fused_params", "compute_kernel")),
    Hook(
        ShardedEmbeddingBagCollection,
        defined=(
            *("_initialize_torch_state", "reset_parameters", "create_embedding_bag_sharding", "create_context"),
            *("input_dist", "output_dist", "compute_and_output_dist", "update_shards", "unsharded_module_type"),
            "register_post_lookup_tracker_fn",
        ),
        used=(*_COLLECTION, "embedding_bags", "_embedding_names", "_embedding_bag_configs"),
    ),
    Hook(
        ShardedEmbeddingCollection,
        defined=(
            *("_initialize_torch_state", "reset_parameters", "create_embedding_sharding", "create_context"),
            *("input_dist", "output_dist", "compute_and_output_dist", "_dedup_indices"),
            "register_post_lookup_tracker_fn",
        ),
        used=(*_COLLECTION, "embeddings", "_sharding_type_to_sharding"),
    ),
    Hook(EmbeddingBagCollectionContext, defined=("record_stream",)),
    Hook(EmbeddingCollectionContext, used=("input_features", "reverse_indices")),
    *(
        Hook(
            lookup,
            defined=("_create_embedding_kernel", "named_parameters", "forward", "register_optim_state_tracker_fn"),
            used=("_create_embedding_kernel", "_emb_modules", "named_parameters_by_table", "state_dict"),
        )
        for lookup in (GroupedPooledEmbeddingsLookup, GroupedEmbeddingsLookup)
    ),
    Hook(BaseEmbedding, defined=("forward", "config")),
    *(
        Hook(
            # TorchRec's sharding, from which ours is derived.
            ours.__bases__[-1],
            defined=("create_input_dist", "create_output_dist", "create_lookup", "feature_names"),
            used=(
                *("_env", "_device", "_grouped_embedding_configs_per_rank"),
                *(() if kind == DATA_PARALLEL else ("_pg",)),
                *(
                    ("_grouped_embedding_configs_per_node", "_get_feature_hash_sizes")
                    if kind in ("table_row_wise", "grid_shard")
                    else ()
                ),
            ),
        )
        for kind, ours in (*POOLED_SHARDINGS.items(), *SEQUENCE_SHARDINGS.items())
    ),
    Hook(RwPooledEmbeddingDist, used=("_codecs", "_pg")),
    Hook(TwRwSparseFeaturesDist, used=("_feature_block_sizes_tensor", "_local_size")),
    # The ids of copies of nodes.
    Hook(_override_input_dist_forwards, used=("_input_dists", "_dist", "forward")),
    Hook(KJTAllToAll, defined=("forward",), used=("_pg", "_splits")),
    Hook(TwPooledEmbeddingDist, used=("_codecs", "_pg", "_callbacks", "_dim_sum_per_rank")),
    Hook(Awaitable, defined=("callbacks",)),
    Hook(FeatureProcessedEmbeddingBagCollection, used=("_embedding_bag_collection",)),
    Hook(FeatureProcessedEmbeddingBagCollectionSharder, defined=("shard", "shardable_parameters")),
    Hook(BaseManagedCollisionEmbeddingCollection, used=("_embedding_module", "_managed_collision_collection")),
    Hook(BaseManagedCollisionEmbeddingCollectionSharder, defined=("shardable_parameters",), used=("_e_sharder",)),
    # The attributes that TorchRec's constructor sets, and its methods read.
    Hook(
        BaseShardedManagedCollisionEmbeddingCollection,
        used=(
            *("_embedding_module", "_managed_collision_collection", "_table_to_tbe_and_index", "_buffer_ids", "bagged"),
            *("_return_remapped_features", "_allow_in_place_embed_weight_update"),
        ),
    ),
    Hook(
        ShardedManagedCollisionCollection,
        defined=("compute", "output_dist", "evict"),
        used=(
            *("_sharding_tables", "_sharding_per_table_feature_splits", "_table_to_offset", "shards_metadata"),
            *("_grouped_embedding_configs", "local_metadata", "num_embeddings"),
        ),
    ),
    # TorchRec's fused collections, and its quantised ones, which are refused.
    Hook(fuse_embedding_optimizer, used=("named_children",)),
    *(Hook(function, used=("state_dict",)) for function in (quantize_state_dict, _get_device)),
    Hook(ModelDeltaTrackerTrec, used=("register_post_lookup_tracker_fn", "register_optim_state_tracker_fn")),
    Hook(EmbeddingFusedOptimizer, used=("_emb_module",)),
    Hook(KeyedOptimizerWrapper, used=("_optimizer",)),
    Hook(OptimizerWrapper, used=("_optimizer",)),
    Hook(in_backward_optimizer_filter, used=("_in_backward_optimizers",)),
    Hook(_apply_optimizer_in_backward, used=("_in_backward_optimizers", "_optimizer_classes", "_optimizer_kwargs")),
    Hook(DistributedDataParallel, defined=("_get_active_ddp_module",)),
    Hook(ShardedTensor, defined=("_init_from_local_shards_and_global_metadata",), used=("_process_group",)),
    Hook(DTensor, used=("_local_tensor", "_spec")),
    Hook(LocalShardsWrapper, defined=("local_shards", "local_offsets")),
    # TorchRec's 2D parallelism averages what `SyncedTables` returns.
    Hook(DMPCollection, used=("_lookups", "split_embedding_weights", "get_optimizer_state", "sum")),
    Hook(ShardingEnv2D, used=("sharding_pg", "replica_pg", "global_rank", "device_mesh", "sharding_strategy")),
    Hook(dist.ProcessGroup, defined=("_device_types",)),
    # launch/ changes the time-outs of process groups.
    Hook(distributed_c10d, defined=("_world", "set_timeout" if hasattr(dist, "set_timeout") else "_set_pg_timeout")),
    Hook(nn.Module, defined=("_apply",), used=("_apply",)),
)


def require(hooks: Iterable[Hook]) -> None:
    """Looks up every name of ``hooks``.

    Args:
        hooks (Iterable[Hook]): the names.

    Raises:
        ImportError: the installed version lacks names.

    Example:
        >>> import torch
        >>> from torchrec_qr.distributed.hooks import Hook, require
        >>> require([Hook(torch.nn.Linear, defined=("forward",), used=("in_features",))])
        >>> require([Hook(torch.nn.Linear, defined=("backward",))])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ImportError: torch ... lacks torch.nn.modules.linear.Linear.backward, on which torchrec_qr relies: ...
    """
    lacking = [f"{_path(hook.owner)}.{name}" for hook in hooks for name in _lacking(hook)]
    if lacking:
        package = lacking[0].split(".")[0]
        raise ImportError(
            f"{package} {metadata.version(package)} lacks {', '.join(lacking)}, on which torchrec_qr relies: with this "
            "version, tables might silently not train; `torchrec-qr doctor` names the versions that are tested"
        )


def _lacking(hook: Hook) -> list[str]:
    used = {name for function in _functions(hook.owner) for name in _names(function.__code__)} if hook.used else set()
    return [
        *(name for name in hook.defined if not hasattr(hook.owner, name)),
        *(name for name in hook.used if name not in used),
    ]


def _functions(owner: Any) -> Iterator[FunctionType]:
    """Yields a function itself, or the methods of a class and of its bases in the package, without decorators."""
    package = owner.__module__.split(".")[0]
    classes = [cls for cls in getattr(owner, "__mro__", ()) if cls.__module__.split(".")[0] == package]
    for member in [value for cls in classes for value in vars(cls).values()] or [owner]:
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if callable(member) and isinstance(function := inspect.unwrap(member), FunctionType):
            yield function


def _names(code: CodeType) -> set[str]:
    """Returns the names, arguments and strings of a function's code, and of the functions within."""
    names = {*code.co_names, *code.co_varnames}
    constants = list(code.co_consts)
    while constants:
        constant = constants.pop()
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, tuple | frozenset):
            constants += constant
        elif isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _path(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
