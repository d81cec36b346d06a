"""The logical tables of a collection in the form that TorchRec takes, and checks of a plan for them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)

from torchrec_qr.configs import CompositionalConfig, CompositionalEmbeddingBagConfig, is_compositional
from torchrec_qr.distributed.fused_params import check_decay_of_plain_table, merged_fused_params
from torchrec_qr.distributed.layout import ROW_SPLIT, ShardLayout, ShardLayouts, shards_of
from torchrec_qr.distributed.per_node_plan import is_per_node, within_node
from torchrec_qr.modules.table import CompositionalTable

# The compute kernels that plain tables may have: whose rows are in the memory of a device or of the host, and whose
# rows are in a store of FBGEMM's, which needs CUDA and draws initial values itself.
IN_MEMORY = ("fused", "fused_uvm", "fused_uvm_caching", "dense")
IN_STORES = ("key_value", "ssd_virtual_table", "dram_virtual_table", "dram_ssd_virtual_table")


def placeholders(configs: Sequence[BaseEmbeddingConfig], tables: nn.ModuleDict) -> dict[str, nn.Parameter]:
    """Returns one parameter per logical table, which a plan shards: a plain table's own, or (R, D) on the meta device.

    Raises:
        ValueError: the partitions of a table differ in their attached optimizers, or in ``requires_grad``.
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
            # TorchRec's helpers for plans by hand read the compute kernel from this attribute.
            p._in_backward_optimizers = weights[0]._in_backward_optimizers  # type: ignore[attr-defined]
        for attribute in ("_optimizer_classes", "_optimizer_kwargs"):
            values = [getattr(w, attribute, None) for w in weights]
            if any(v != values[0] for v in values):
                raise ValueError(
                    f"table {config.name!r}: its partitions have different optimizers attached, {attribute[1:]} "
                    f"{values}; allowed: one optimizer for all partitions of a table"
                )
            if values[0] is not None:
                # Set a copy, because TorchRec changes these in place.
                setattr(p, attribute, copy.deepcopy(values[0]))
        out[config.name] = p
    return out


class LogicalView:
    """A collection in the form that TorchRec's sharded classes take: one plain table per logical table.

    The pooling of the tables of `is_divided` is SUM. `ShardedCompositionalEmbeddingBagCollection` divides for MEAN.

    Args:
        module (Any): the collection.
        layouts (ShardLayouts): the layouts of its compositional tables.
        plan (Mapping[str, ParameterSharding]): the plan of the collection.
        parameters (Mapping[str, nn.Parameter]): one per logical table, from `placeholders`.
        prefix (str): TorchRec's prefix of the names of parameters.
    """

    # TorchRec's constructor then copies no values.
    device = torch.device("meta")

    def __init__(
        self,
        module: Any,
        layouts: ShardLayouts,
        plan: Mapping[str, ParameterSharding],
        parameters: Mapping[str, nn.Parameter],
        prefix: str,
    ) -> None:
        self._module = module
        plain = [_as_plain(layouts[c.name]) if c.name in layouts else c for c in module.embedding_configs()]
        self._configs = [replace(c, pooling=PoolingType.SUM) if is_divided(c, plan) else c for c in plain]
        self._parameters = {f"{prefix}.{name}.weight": p for name, p in parameters.items()}

    def embedding_bag_configs(self) -> list[Any]:
        return self._configs

    embedding_configs = embedding_bag_configs

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._parameters.items())

    def state_dict(self) -> dict[str, nn.Parameter]:
        return dict(self._parameters)

    def __getattr__(self, name: str) -> Any:
        # TorchRec also calls is_weighted, need_indices, embedding_dim, embedding_names_by_table, use_gather_select,
        # use_gather_select_per_sharding and use_sorted_select of the module.
        return getattr(self._module, name)


def is_divided(config: BaseEmbeddingConfig, plan: Mapping[str, ParameterSharding]) -> bool:
    """Returns whether a table has MEAN pooling, and ranks send sums, which the collection divides.

    These are all compositional tables, and plain ones whose rows are split. TorchRec would divide for such a plain
    table itself, and the tables of other sharding types with it.

    Args:
        config (BaseEmbeddingConfig): the table.
        plan (Mapping[str, ParameterSharding]): the plan of the collection.
    """
    sends_sums = is_compositional(config) or plan[config.name].sharding_type in ROW_SPLIT
    return isinstance(config, EmbeddingBagConfig) and config.pooling == PoolingType.MEAN and sends_sums


def _as_plain(layout: ShardLayout) -> EmbeddingBagConfig | EmbeddingConfig:
    config = layout.config
    fields: dict[str, Any] = {
        "name": config.name,
        "feature_names": config.feature_names,
        "num_embeddings": layout.num_ids,
        "embedding_dim": config.embedding_dim,
        "data_type": config.data_type,
    }
    if isinstance(config, CompositionalEmbeddingBagConfig):
        return EmbeddingBagConfig(**fields, pooling=PoolingType.SUM)
    return EmbeddingConfig(**fields)


def shard_layouts(
    configs: Sequence[BaseEmbeddingConfig],
    plan: Mapping[str, ParameterSharding],
    parameters: Mapping[str, nn.Parameter],
) -> ShardLayouts:
    """Returns the layouts of the compositional tables among ``configs`` under a plan.

    Raises:
        NotImplementedError, ValueError: see `check_plan`.
    """
    compositional = {c.name: c for c in configs if is_compositional(c)}
    check_plan(compositional, plan)
    return ShardLayouts(
        {
            name: ShardLayout(
                config=config,
                sharding_type=within_node(plan[name].sharding_type),
                compute_kernel=plan[name].compute_kernel,
                shards=shards_of(plan[name]),
                frozen=not parameters[name].requires_grad,
                is_copied=is_per_node(plan[name].sharding_type),
            )
            for name, config in compositional.items()
        }
    )


def check_plan(configs: Mapping[str, CompositionalConfig], plan: Mapping[str, ParameterSharding]) -> None:
    """Refuses a plan that compositional tables do not support.

    Raises:
        NotImplementedError: a compute kernel is neither fused nor dense.
        ValueError: the plan splits columns of a ``path`` table.
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
                "data_parallel (a planner takes sharding_types of ParameterConstraints)"
            )


def check_plain_tables(
    configs: Sequence[BaseEmbeddingConfig],
    plan: Mapping[str, ParameterSharding],
    parameters: Mapping[str, nn.Parameter],
    device: torch.device | None,
    fused_params: Mapping[str, Any] | None = None,
) -> None:
    """Refuses plain tables for which TorchRec's kernels fail without a table's name, crash, or return wrong results.

    Raises:
        NotImplementedError: bf16 on a CPU, ``requires_grad_(False)``, a compute kernel with a store on a CPU, the dense
            kernel without pooling on a CPU, a split table with the dense kernel on the meta device, or weight decay
            that FBGEMM drops.
    """
    for config in (c for c in configs if not is_compositional(c)):
        name, rows = config.name, config.num_embeddings
        on_cpu = device is None or device.type == "cpu"
        if on_cpu and config.data_type == DataType.BF16:
            raise NotImplementedError(
                f"table {name!r}: data_type={config.data_type} is not supported by FBGEMM's kernels on a CPU, "
                "which look up plain tables; allowed: FP32, FP16, or a compositional table of one partition, "
                f"MixedRadix(sizes=[{rows}])"
            )
        if not parameters[name].requires_grad:
            raise NotImplementedError(
                f"table {name!r}: requires_grad_(False) of a plain table is not honoured by TorchRec's kernels, which "
                "would step it; allowed: a compositional table of one partition, which can be frozen: "
                "MixedRadix(sizes=[num_embeddings])"
            )
        kernel = plan[name].compute_kernel
        allowed = IN_MEMORY if on_cpu else (*IN_MEMORY, *IN_STORES)
        if kernel not in allowed:
            raise NotImplementedError(
                f"table {name!r}: compute kernel {kernel!r} of a plain table is not supported on {device or 'cpu'}; "
                f"allowed: {', '.join(allowed)}"
            )
        if kernel != EmbeddingComputeKernel.DENSE.value:
            check_decay_of_plain_table(name, merged_fused_params(fused_params, parameters[name]), on_cpu)
        if on_cpu and kernel == EmbeddingComputeKernel.DENSE.value and isinstance(config, EmbeddingConfig):
            raise NotImplementedError(
                f"table {name!r}: compute kernel {kernel!r} ({plan[name].sharding_type}) of a plain table without "
                "pooling is not supported on a CPU, where FBGEMM pools its ids; allowed: a plan with 'fused', which "
                f"data_parallel lacks, or a compositional table of one partition, MixedRadix(sizes=[{rows}])"
            )
        if device is not None and device.type == "meta" and kernel == "dense" and shards_of(plan[name]):
            raise NotImplementedError(
                f"table {name!r}: compute kernel {kernel!r} ({plan[name].sharding_type}) of a plain table is not "
                "supported on the meta device, because TorchRec's dense kernel allocates its rows on the CPU; allowed: "
                "a plan with 'fused', or data_parallel"
            )


def num_column_blocks(sharding: ParameterSharding) -> int:
    """Returns the number of blocks of columns into which a plan splits a table."""
    return max(1, len({shard.shard_offsets[1] for shard in shards_of(sharding)}))
