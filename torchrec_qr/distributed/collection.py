"""What the two sharded collections share: the view of a module that TorchRec shards, and the state that it shows."""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_qr.configs import CompositionalConfig, CompositionalEmbeddingBagConfig, CompositionalEmbeddingConfig
from torchrec_qr.distributed.shards import DATA_PARALLEL, stored_shards
from torchrec_qr.fingerprint import check_saved_tables, fingerprint
from torchrec_qr.init import partition_configs
from torchrec_qr.modules.table import CompositionalTable


def is_compositional(config: BaseEmbeddingConfig) -> bool:
    """Whether a config is of a compositional table, pooled or not."""
    return isinstance(config, CompositionalEmbeddingBagConfig | CompositionalEmbeddingConfig)


def placeholders(configs: list[BaseEmbeddingConfig], tables: nn.ModuleDict) -> dict[str, nn.Parameter]:
    """One parameter per logical table for TorchRec to plan: a plain table's own, or (R, D) on the meta device.

    Raises:
        ValueError: partitions of one table with different optimizers attached, or frozen in part.
    """
    out: dict[str, nn.Parameter] = {}
    for config in configs:
        table = tables[config.name]
        if not isinstance(table, CompositionalTable):
            out[config.name] = table.get_parameter("weight")
            continue
        weights = table.weights()
        if len({w.requires_grad for w in weights}) > 1:
            flags = [w.requires_grad for w in weights]
            raise ValueError(
                f"table {config.name!r}: requires_grad of its partitions is {flags}; allowed: one flag for all "
                "partitions of a table that is sharded; those of a sharded table may be frozen one by one"
            )
        rows = sum(w.shape[0] for w in weights)
        logical = torch.empty(rows, config.embedding_dim, dtype=weights[0].dtype, device="meta")
        p = nn.Parameter(logical, requires_grad=weights[0].requires_grad)
        if hasattr(weights[0], "_in_backward_optimizers"):
            # TorchRec's helpers for plans by hand read the compute kernel from this mark.
            p._in_backward_optimizers = weights[0]._in_backward_optimizers  # type: ignore[attr-defined]
        for attribute in ("_optimizer_classes", "_optimizer_kwargs"):
            values = [getattr(w, attribute, None) for w in weights]
            if any(v != values[0] for v in values):
                raise ValueError(
                    f"table {config.name!r}: its partitions have different optimizers attached, {attribute[1:]} "
                    f"{values}; allowed: one optimizer for all partitions of a table"
                )
            if values[0] is not None:
                # A copy: TorchRec changes these in place.
                setattr(p, attribute, copy.deepcopy(values[0]))
        out[config.name] = p
    return out


class LogicalView:
    """A collection as TorchRec's sharded classes see it: one parameter per logical table.

    ``pooling`` of compositional tables is SUM here: `ShardedCompositionalEmbeddingBagCollection` divides for MEAN.
    """

    device = torch.device("meta")  # parameters are taken over by our own state, not by TorchRec's constructor

    def __init__(self, module: Any, configs: list[Any], prefix: str, tables: nn.ModuleDict) -> None:
        self._module = module
        self._configs = [
            replace(c, pooling=PoolingType.SUM) if isinstance(c, CompositionalEmbeddingBagConfig) else c
            for c in configs
        ]
        self._parameters = {f"{prefix}.{name}.weight": p for name, p in placeholders(configs, tables).items()}

    def embedding_bag_configs(self) -> list[Any]:
        return self._configs

    embedding_configs = embedding_bag_configs

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._parameters.items())

    def state_dict(self) -> dict[str, nn.Parameter]:
        return dict(self._parameters)

    def use_gather_select(self) -> bool:
        return False

    def use_gather_select_per_sharding(self) -> None:
        return None

    def use_sorted_select(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        # is_weighted, need_indices, embedding_dim, embedding_names_by_table, …: as the module says.
        return getattr(self._module, name)


class NestedModuleDict(nn.ModuleDict):
    """A ``ModuleDict`` in which key ``"t.partition_0"`` is child ``partition_0`` of child ``t``.

    The stock one refuses dots.
    """

    def __setitem__(self, key: str, module: nn.Module) -> None:
        *path, leaf = key.split(".")
        parent: nn.Module = self
        for name in path:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(leaf, module)

    def __getitem__(self, key: str) -> nn.Module:
        return self.get_submodule(key)


class CompositionalState:
    """State of partitions in a sharded collection of TorchRec, which knows one tensor per table: a mixin.

    TorchRec builds its torch state (parameters, sharded tensors, initial values) from three attributes that name
    tables. `_physical` makes them name partitions while it does.
    """

    # Set by the subclass: TorchRec's names for its children and for its list of configs.
    _tables_attribute: str
    _configs_attribute: str

    _table_names: list[str]
    _table_name_to_config: dict[str, Any]
    module_sharding_plan: Any
    _output_dtensor: bool
    _in_physical = False

    @contextmanager
    def _physical(self) -> Iterator[None]:
        logical_configs = getattr(self, self._configs_attribute)
        saved = self._table_names, logical_configs, self.module_sharding_plan
        configs: list[Any] = []
        plan: dict[str, ParameterSharding] = {}
        for config in logical_configs:
            sharding = self.module_sharding_plan[config.name]
            if not is_compositional(config):
                configs.append(config)
                plan[config.name] = sharding
                continue
            for j, partition in enumerate(partition_configs(config)):
                configs.append(partition)
                plan[partition.name] = partition_sharding(config, j, sharding)
        self._table_names, self.module_sharding_plan = [c.name for c in configs], plan
        setattr(self, self._configs_attribute, configs)
        self._table_name_to_config.update({c.name: c for c in configs})  # its state-dict hooks look them up later
        self._in_physical = True
        try:
            yield
        finally:
            self._table_names, _, self.module_sharding_plan = saved
            setattr(self, self._configs_attribute, saved[1])
            self._in_physical = False

    def _initialize_torch_state(self, *args: Any, **kwargs: Any) -> None:
        if self._output_dtensor:
            # Also what `DMPCollection` asks for: its replicas are synchronised by FBGEMM's kernel, which is not ours.
            raise NotImplementedError(
                f"tables {[c.name for c in self._compositional_configs()]}: output_dtensor=True of the sharding "
                "environment, as of DMPCollection, is not supported by sharded compositional collections; allowed: "
                "False, with DistributedModelParallel"
            )
        with self._physical():
            super()._initialize_torch_state(*args, **kwargs)  # type: ignore[misc]
        for config in self._compositional_configs():
            table = getattr(self, self._tables_attribute)[config.name]
            table.register_buffer("fingerprint", fingerprint(config).to(self._device))  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        if self._in_physical:
            super().reset_parameters()  # type: ignore[misc]
            return
        with self._physical():
            super().reset_parameters()  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self._tables_attribute and type(value) is nn.ModuleDict:
            value = NestedModuleDict()
        super().__setattr__(name, value)

    def _compositional_configs(self) -> list[CompositionalConfig]:
        return [c for c in getattr(self, self._configs_attribute) if is_compositional(c)]

    @staticmethod
    def _pre_load_state_dict_hook(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Brings values of partitions into the shape that this rank stores, and refuses tables of another meaning."""
        prefix = f"{prefix}{self._tables_attribute}."
        tables, configs = getattr(self, self._tables_attribute), self._compositional_configs()
        check_saved_tables(state_dict, prefix, ((c, tables[c.name].fingerprint) for c in configs))
        partitions: set[str] = set()
        for config in configs:
            for j in range(config.num_partitions):
                name = f"{config.name}.partition_{j}"
                partitions.add(name)
                value = state_dict.get(f"{prefix}{name}.weight")
                if value is not None:
                    parameter = tables[name].weight
                    shards = self._model_parallel_name_to_local_shards.get(name)
                    state_dict[f"{prefix}{name}.weight"] = _as_stored(value, parameter, shards)
        # TorchRec's own hook takes shards of one width for granted: it is shown the plain tables only.
        of_all = self._model_parallel_name_to_local_shards
        self._model_parallel_name_to_local_shards = OrderedDict(
            (name, shards) for name, shards in of_all.items() if name not in partitions
        )
        try:
            super(CompositionalState, type(self))._pre_load_state_dict_hook(  # type: ignore[misc]
                self, state_dict, prefix.removesuffix(f"{self._tables_attribute}."), *args
            )
        finally:
            self._model_parallel_name_to_local_shards = of_all


def partition_sharding(config: CompositionalConfig, j: int, logical: ParameterSharding) -> ParameterSharding:
    """The plan of partition j that follows from the plan of its logical table."""
    spec = logical.sharding_spec
    shards = (
        stored_shards(config, j, logical.sharding_type, spec.shards)
        if isinstance(spec, EnumerableShardingSpec)
        else None
    )
    if shards is not None:
        return replace(logical, sharding_spec=EnumerableShardingSpec(shards))
    kernel = EmbeddingComputeKernel.DENSE.value
    return replace(logical, sharding_type=DATA_PARALLEL, compute_kernel=kernel, sharding_spec=None)


def _as_stored(value: Any, parameter: Tensor, shards: list[Any] | None) -> Tensor:
    """The part of a partition that this rank stores, from its whole value or from the same shards."""
    if shards is None:
        full: Tensor = value
        return full
    if isinstance(value, ShardedTensor):
        pieces = [s.tensor for s in value.local_shards()]
    else:
        pieces = []
        for shard in shards:
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            pieces.append(value[row : row + rows, column : column + columns])
    if not pieces:
        return parameter.new_empty(0)
    return torch.cat([p.reshape(-1) for p in pieces]).view(parameter.shape)


def check_plan(configs: Mapping[str, CompositionalConfig], plan: Mapping[str, ParameterSharding]) -> None:
    """Refuses what a plan asks of compositional tables and cannot be had.

    Raises:
        NotImplementedError: a compute kernel that is neither fused nor dense.
        ValueError: ``path`` where the plan splits columns.
    """
    for name, config in configs.items():
        sharding = plan[name]
        allowed = (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value)
        if sharding.compute_kernel not in allowed:
            raise NotImplementedError(
                f"table {name!r}: compute kernel {sharding.compute_kernel!r} is not supported by compositional tables; "
                f"allowed: {', '.join(allowed)}"
            )
        if config.operation == "path" and num_column_blocks(sharding) > 1:
            raise ValueError(
                f"table {name!r}: operation='path' cannot be {sharding.sharding_type}: its MLPs need all "
                f"{config.embedding_dim} columns of the base row; allowed: table_wise, row_wise, table_row_wise, "
                "data_parallel (a planner is told by sharding_types of ParameterConstraints)"
            )


def check_plain_types(configs: list[Any], device: torch.device | None) -> None:
    """Refuses what FBGEMM refuses at the first batch, in words that name no table.

    Raises:
        NotImplementedError: a plain table in bf16 on a CPU.
    """
    for config in configs:
        on_cpu = device is None or device.type == "cpu"
        if on_cpu and not is_compositional(config) and config.data_type == DataType.BF16:
            rows = config.num_embeddings
            raise NotImplementedError(
                f"table {config.name!r}: data_type={config.data_type} is not supported by FBGEMM's kernels on a CPU, "
                "which look up plain tables; allowed: FP32, FP16, or a compositional table of one partition, "
                f"MixedRadix(sizes=[{rows}])"
            )


def refuse_frozen(parameters: Mapping[str, Any]) -> None:
    """Raises NotImplementedError where a plain table, by name, is frozen: TorchRec's kernels step it all the same."""
    for name, p in parameters.items():
        if not p.requires_grad:
            raise NotImplementedError(
                f"table {name!r}: requires_grad_(False) of a plain table is not honoured by TorchRec's kernels, which "
                "would step it; allowed: a compositional table of one partition, which can be frozen: "
                "MixedRadix(sizes=[num_embeddings])"
            )


def num_column_blocks(sharding: ParameterSharding) -> int:
    """Into how many blocks of columns a plan cuts a table."""
    spec = sharding.sharding_spec
    return len({s.shard_offsets[1] for s in spec.shards}) if isinstance(spec, EnumerableShardingSpec) else 1


def checked_features(features: Any) -> KeyedJaggedTensor:
    """Returns the batch of a sharded collection, a ``KeyedJaggedTensor`` or a ``TensorDict``, as the former.

    Raises:
        NotImplementedError: features that differ in their number of bags.
    """
    features = maybe_td_to_kjt(features, None)
    if features.variable_stride_per_key():
        raise NotImplementedError(
            "variable batch per feature is not supported by sharded compositional collections; features "
            f"{features.keys()}"
        )
    return features


def attach(infos: Mapping[str, list[Any]], configs: list[Any]) -> None:
    """Gives TorchRec's sharding infos the compositional configs that they were made from; see `placement.place`."""
    by_name = {c.name: c for c in configs if is_compositional(c)}
    for info in (info for group in infos.values() for info in group):
        info.embedding_config.compositional = by_name.get(info.embedding_config.name)


def compute_kernels(sharding_type: str) -> list[str]:
    """Returns the compute kernels that a planner may choose for a compositional table."""
    dense = sharding_type == DATA_PARALLEL
    return [EmbeddingComputeKernel.DENSE.value if dense else EmbeddingComputeKernel.FUSED.value]
