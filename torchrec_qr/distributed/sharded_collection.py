"""The base of the two sharded collections: their construction and their state dict."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.optim.fused import EmptyFusedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_qr.configs import is_compositional
from torchrec_qr.distributed.customized_kernel import with_customized_kernel
from torchrec_qr.distributed.delta_tracker import refuse_tracker
from torchrec_qr.distributed.global_tensor import ShardGroup
from torchrec_qr.distributed.layout import DATA_PARALLEL, ShardLayouts
from torchrec_qr.distributed.logical_tables import (
    IN_STORES,
    LogicalView,
    check_plain_tables,
    placeholders,
    shard_layouts,
)
from torchrec_qr.distributed.lookup_kernel import own_lookup
from torchrec_qr.distributed.node_env import node_env_of
from torchrec_qr.distributed.per_node_plan import is_per_node
from torchrec_qr.distributed.replication import replicate, step_alone
from torchrec_qr.distributed.stored_partition import StoredPartition
from torchrec_qr.distributed.two_dimensional import check_ranks, start_alike
from torchrec_qr.fingerprint import check_form, check_row_types, check_saved_tables, fingerprint
from torchrec_qr.init import partition_configs
from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
from torchrec_qr.modules.embedding_collection import CompositionalEmbeddingCollection


class ShardedCompositionalCollection:
    """A mixin of TorchRec's two sharded collections, in which compositional tables have the customized kernel.

    TorchRec leaves the state of such tables to its subclass. It registers the parameters of plain tables, and an empty
    module for each compositional table, which `_register_partitions` fills.
    """

    # TorchRec's name for the tables of the subclass.
    _tables_attribute: str
    # The devices of a module whose values are drawn anew, unless they were fitted. The sharded module keeps others.
    _drawn_anew: tuple[str, ...]

    # The configs of all tables, and the layouts of compositional ones.
    _configs: Sequence[BaseEmbeddingConfig]
    _layouts: ShardLayouts

    module_sharding_plan: Any
    _lookups: list[nn.Module]
    _device: torch.device | None
    _env: ShardingEnv
    # All partitions by name, None until they are registered, and the tensors of a state dict for split ones.
    _partitions: dict[str, StoredPartition] | None
    # The place of each feature in the first batch.
    _places: list[tuple[int, str]]
    _split: dict[str, Tensor | ShardedTensor | DTensor]

    def __init__(
        self,
        module: CompositionalEmbeddingBagCollection | CompositionalEmbeddingCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        plan = table_name_to_parameter_sharding
        self._configs = module.embedding_configs()
        self._places = []
        parameters = placeholders(self._configs, getattr(module, self._tables_attribute))
        self._layouts = shard_layouts(self._configs, plan, parameters)
        check_plain_tables(self._configs, plan, parameters, device, fused_params)
        check_ranks(plan, env)
        view: Any = LogicalView(module, self._layouts, plan, parameters, self._tables_attribute)
        plan = with_customized_kernel(plan, self._layouts)
        self._prepare(plan)
        super().__init__(view, plan, env, fused_params, device, **kwargs)  # type: ignore[call-arg]
        self._replicate_lookups()
        has_values = module.device.type not in self._drawn_anew or module.has_fitted_values
        if has_values and not self._is_meta:
            cast(nn.Module, self).load_state_dict(module.state_dict())
            # Ranks may have drawn other values, such as from other seeds.
            self._start_alike()

    def _prepare(self, plan: Mapping[str, ParameterSharding]) -> None:
        """Checks a plan, and sets plain attributes before the constructor of nn.Module."""
        raise NotImplementedError

    def _replicate_lookups(self) -> None:
        """Wraps replicas in DDP. TorchRec has wrapped the lookups of data-parallel tables.

        TorchRec 1.9 does not wrap them if ``mark_data_parallel_skip_grad_sync`` is set on the module. Each rank then
        steps its data-parallel replicas alone.

        Raises:
            RuntimeError: TorchRec has not wrapped a data-parallel lookup, though the mark is not set.
        """
        pg, within = self._env.process_group, ShardGroup.of_env(self._env).pg
        assert pg is not None
        assert within is not None
        is_marked: bool = getattr(self, "_skip_data_parallel_grad_sync", False)
        for lookup in self._lookups:
            own = own_lookup(lookup)
            if not own.is_data_parallel:
                # Leave replicas on the meta device alone, because they have no values to reduce.
                if not self._is_meta:
                    own.replicate(partial(replicate, pg=within, average=False, peers=own.peers))
            elif isinstance(lookup, DistributedDataParallel):
                replicate(lookup, pg, average=True)
            elif is_marked:
                step_alone(own)
            else:
                plan = self.module_sharding_plan
                tables = [name for name, sharding in plan.items() if sharding.sharding_type == DATA_PARALLEL]
                raise RuntimeError(
                    f"{type(self).__name__}: TorchRec {metadata.version('torchrec')} has not wrapped the lookup of "
                    f"data_parallel tables {tables} in DistributedDataParallel, which would reduce their gradients; "
                    "allowed: a version of TorchRec that `torchrec-qr doctor` calls tested"
                )

    def _initialize_torch_state(self, *args: Any, **kwargs: Any) -> None:
        self._partitions = None
        super()._initialize_torch_state(*args, **kwargs)  # type: ignore[misc]
        self._partitions = self._register_partitions()
        shards = ShardGroup.of_env(self._env)
        self._split = {name: p.as_global(shards) for name, p in self._partitions.items() if not p.is_replicated}
        module = cast(nn.Module, self)
        module.register_state_dict_post_hook(_show_shards)
        module.register_load_state_dict_pre_hook(_load_shards)
        self.reset_parameters()

    def _register_partitions(self) -> dict[str, StoredPartition]:
        """Returns all partitions by name, also those of which this rank stores nothing."""
        here = {p.key: p for lookup in self._lookups for p in own_lookup(lookup).partitions()}
        partitions: dict[str, StoredPartition] = {}
        for name, layout in self._layouts.items():
            module = self._module_of(name)
            module.register_buffer("fingerprint", fingerprint(layout.config).to(self._device))
            fused = layout.compute_kernel != EmbeddingComputeKernel.DENSE.value
            for j in range(layout.config.num_partitions):
                stored = here.get((name, j))
                if stored is None:
                    stored = StoredPartition(layout, j, fused, self._device)
                    if fused:
                        stored.weight._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
                child = nn.Module()
                child.register_parameter("weight", stored.weight)
                module.add_module(f"partition_{j}", child)
                partitions[stored.name] = stored
        return partitions

    def reset_parameters(self) -> None:
        """Draws every parameter anew, table by table."""
        # Return at first, because TorchRec calls this before partitions are registered.
        if self._partitions is None or self._is_meta:
            return
        for config, _, weight, _ in self._weights():
            assert config.init_fn is not None
            config.init_fn(weight)
        self._start_alike()

    def _start_alike(self) -> None:
        """Gives ranks that hold the same rows the values of the first: replicas, 2D groups and copies per node."""
        for _, table, weight, is_replicated in self._weights():
            if is_replicated:
                dist.broadcast(weight.data, src=0, group=self._env.process_group)
                continue
            start_alike(weight, self._env)
            if is_per_node(self.module_sharding_plan[table].sharding_type) and weight.numel():
                node_env_of(self._env).peers.broadcast(weight.data)

    def _weights(self) -> Iterator[tuple[BaseEmbeddingConfig, str, nn.Parameter, bool]]:
        """Yields of each partition and plain table the config, the table, the weight, and whether it is a replica."""
        assert self._partitions is not None
        for config in self._configs:
            if is_compositional(config):
                for partition in partition_configs(config):
                    stored = self._partitions[partition.name]
                    yield partition, config.name, stored.weight, stored.is_replicated
            elif (sharding := self.module_sharding_plan[config.name]).compute_kernel not in IN_STORES:
                weight = self._module_of(config.name).get_parameter("weight")
                yield config, config.name, weight, sharding.sharding_type == DATA_PARALLEL

    def register_post_lookup_tracker_fn(self, record_fn: Callable[..., None]) -> None:
        """Registers a function of TorchRec's ``ModelDeltaTracker``, which reports the ids of plain tables.

        Args:
            record_fn (Callable[..., None]): the function.

        Raises:
            NotImplementedError: a table is compositional. The tracker would report ids as rows of a partition.
        """
        refuse_tracker(self._layouts)
        super().register_post_lookup_tracker_fn(record_fn)  # type: ignore[misc]

    @property
    def _is_meta(self) -> bool:
        return self._device is not None and self._device.type == "meta"

    def _module_of(self, table: str) -> nn.Module:
        module: nn.Module = getattr(self, self._tables_attribute)[table]
        return module


def _show_shards(collection: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Puts sharded tensors of split partitions into a state dict, in place of this rank's rows."""
    for name, shown in collection._split.items():
        state_dict[f"{prefix}{collection._tables_attribute}.{name}.weight"] = shown


def _load_shards(collection: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuses tables of another form or fingerprint, and cuts the values of partitions to this rank's rows."""
    prefix = f"{prefix}{collection._tables_attribute}."
    for config in collection._configs:
        check_form(state_dict, f"{prefix}{config.name}", is_compositional(config))
        check_row_types(state_dict, f"{prefix}{config.name}", quantised=False)
    tables = [(of.config, collection._module_of(name).fingerprint) for name, of in collection._layouts.items()]
    check_saved_tables(state_dict, prefix, tables)
    for name, stored in collection._partitions.items():
        key = f"{prefix}{name}.weight"
        if key in state_dict:
            state_dict[key] = stored.part_of(state_dict[key])


def checked_features(collection: "ShardedCompositionalCollection", features: Any) -> KeyedJaggedTensor:
    """Returns a batch, which may be a ``TensorDict``, as a ``KeyedJaggedTensor``.

    Raises:
        KeyError: the batch lacks a feature of a table.
        ValueError: a feature has another place among the keys than in the first batch. TorchRec's input dist reads
            features by their places in the first batch.
    """
    features = maybe_td_to_kjt(features, None)
    keys = features.keys()
    if not collection._places:
        collection._places = _places_of(collection._configs, keys)
    for place, feature in collection._places:
        if place >= len(keys) or keys[place] != feature:
            raise ValueError(
                f"feature {feature!r}: the batch has the keys {keys}; allowed: the feature at place {place}, where the "
                "first batch of the sharded collection had it"
            )
    return features


def _places_of(configs: Sequence[BaseEmbeddingConfig], keys: list[str]) -> list[tuple[int, str]]:
    """Returns the place of each feature of the tables among the keys of a batch."""
    places: dict[str, int] = {}
    for config in configs:
        for feature in config.feature_names:
            if feature not in keys:
                raise KeyError(f"table {config.name!r}: feature {feature!r} is not in the batch; its keys are {keys}")
            places[feature] = keys.index(feature)
    return [(place, feature) for feature, place in places.items()]
