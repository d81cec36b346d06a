"""The tables of a model that its sharders offer to a planner."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption
from torchrec.distributed.planner.utils import sharder_name
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_qr.configs import CompositionalConfig, PartitionShape, is_compositional
from torchrec_qr.distributed.fused_params import merged_fused_params
from torchrec_qr.planner.error_kinds import WRONG_INPUT


@dataclass(frozen=True)
class PlannedTable:
    """One logical table.

    Args:
        path (str): the path of its module in the model.
        name (str): its name.
        parameter (nn.Parameter): the parameter that the sharder shows: (S, D), or the (R, D) placeholder of a
            compositional table.
        module (nn.Module): the collection.
        sharder (ModuleSharder[Any]): the sharder of that module.
        config (CompositionalConfig | None): None for a plain table.
        num_embeddings (int): S.
        num_features (int): the features that use the table.
        is_pooled (bool): whether lookups return bags, not sequences.
        is_weighted (bool): whether ids have weights.
        constraints (ParameterConstraints | None): the user's constraints.
        ranks (tuple[int, ...] | None): the ranks that may own its shards. None means all.
        same_rank_as (str | None): the table whose ranks it takes.
        fused_params (Mapping[str, Any]): the fused optimizer's options by FBGEMM's names.
    """

    path: str
    name: str
    parameter: nn.Parameter
    module: nn.Module
    sharder: ModuleSharder[Any]
    config: CompositionalConfig | None
    num_embeddings: int
    num_features: int
    is_pooled: bool
    is_weighted: bool
    constraints: ParameterConstraints | None = None
    ranks: tuple[int, ...] | None = None
    same_rank_as: str | None = None
    fused_params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The rows of the parameter: R, or S for a plain table."""
        return int(self.parameter.shape[0])

    @property
    def columns(self) -> int:
        """D."""
        return int(self.parameter.shape[1])

    @property
    def fqn(self) -> str:
        """The path and name, because tables of two modules may have one name."""
        return f"{self.path}.{self.name}"

    @property
    def bytes_full(self) -> int:
        """The bytes of S · D values in the table's data type."""
        return self.num_embeddings * self.columns * self.parameter.element_size()

    @cached_property
    def partitions(self) -> list[PartitionShape]:
        """The partitions of a compositional table."""
        return [] if self.config is None else self.config.partition_shapes

    @cached_property
    def inputs_per_sample(self) -> list[float]:
        """The ids per sample of each feature. A single pooling factor counts all features together."""
        if self.constraints is None:
            return [1.0] * self.num_features
        given = [float(x) for x in self.constraints.pooling_factors]
        polls = self.constraints.num_poolings or [1.0] * len(given)
        total = [x * n for x, n in zip(given, polls, strict=False)]
        if len(total) == self.num_features:
            return total
        # Count one id for each feature, because TorchRec's default is a list of one, whatever their number.
        if given == [1.0] and self.constraints.num_poolings is None:
            return [1.0] * self.num_features
        return [sum(total) / self.num_features] * self.num_features


def find_tables(
    model: nn.Module,
    sharders: Sequence[ModuleSharder[Any]],
    constraints: Mapping[str, ParameterConstraints] | None = None,
    ranks: Mapping[str, Sequence[int]] | None = None,
) -> list[PlannedTable]:
    """Returns every table of every module that has a sharder, in the order of the model.

    Args:
        model (nn.Module): the model.
        sharders (Sequence[ModuleSharder[Any]]): the sharders.
        constraints (Mapping[str, ParameterConstraints] | None): constraints by table.
        ranks (Mapping[str, Sequence[int]] | None): the ranks that may own a table's shards, by table.

    Raises:
        PlannerError: there is no table, or constraints name a table that the model does not have.
    """
    constraints, ranks = constraints or {}, ranks or {}
    by_type = {sharder_name(sharder.module_type): sharder for sharder in sharders}
    tables: list[PlannedTable] = []

    def visit(path: str, module: nn.Module) -> None:
        sharder = by_type.get(sharder_name(type(module)))
        if sharder is None:
            for name, child in module.named_children():
                visit(f"{path}.{name}" if path else name, child)
            return
        parameters = sharder.shardable_parameters(module)
        configs = _configs(module)
        is_pooled = ShardingOption.module_pooled(module, path)
        for name, parameter in parameters.items():
            config = configs.get(name)
            of_table = constraints.get(name)
            tables.append(
                PlannedTable(
                    path=path,
                    name=name,
                    parameter=parameter,
                    module=module,
                    sharder=sharder,
                    config=config if is_compositional(config) else None,
                    num_embeddings=parameter.shape[0] if config is None else config.num_embeddings,
                    num_features=1 if config is None else max(len(config.feature_names), 1),
                    is_pooled=is_pooled,
                    is_weighted=_is_weighted(module) or bool(of_table and of_table.is_weighted),
                    constraints=of_table,
                    ranks=tuple(sorted(set(ranks[name]))) if name in ranks else None,
                    fused_params=merged_fused_params(getattr(sharder, "fused_params", None), parameter),
                )
            )

    visit("", model)
    if not tables:
        raise PlannerError(
            f"no tables: no module of the {type(model).__name__} has a sharder and a table; sharders: "
            f"{', '.join(s.__class__.__name__ for s in sharders) or 'none'}",
            WRONG_INPUT,
        )
    known = {t.name for t in tables}
    unknown = sorted((set(constraints) | set(ranks)) - known)
    if unknown:
        raise PlannerError(
            f"constraints of tables {', '.join(map(repr, unknown))}, which the model does not have; allowed: "
            f"{some_names(sorted(known))}",
            WRONG_INPUT,
        )
    return tables


def _configs(module: nn.Module) -> dict[str, BaseEmbeddingConfig]:
    """Returns configs by name, also those of a collection inside TorchRec's feature processors."""
    for m in (module, *module.children()):
        for attribute in ("embedding_bag_configs", "embedding_configs"):
            configs = getattr(m, attribute, None)
            if callable(configs):
                return {c.name: c for c in configs()}
    return {}


def _is_weighted(module: nn.Module) -> bool:
    is_weighted = getattr(module, "is_weighted", None)
    return callable(is_weighted) and bool(is_weighted())


def optimizer_of(table: PlannedTable) -> EmbOptimType:
    """Returns the fused optimizer of a table, FBGEMM's default if none is given."""
    optimizer: EmbOptimType = table.fused_params.get("optimizer", EmbOptimType.EXACT_SGD)
    return optimizer


def some_names(names: Sequence[str]) -> str:
    """Returns up to ten names, and the number of the others."""
    shown = ", ".join(map(repr, names[:10]))
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
