"""The rules by which tables become compositional."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from typing import Any, get_args

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig

from torchrec_qr.compression.found_collections import FoundCollection
from torchrec_qr.configs import (
    CompositionalConfig,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    Operation,
    is_compositional,
    stored_bytes,
)
from torchrec_qr.partitions import PartitionSpec
from torchrec_qr.partitions.checks import checked_between
from torchrec_qr.partitions.row_limit import LEAST_LIMIT, highest_row_limit, within_rows

_OWNER = "compress_"


@dataclass(frozen=True)
class CompressionRules:
    """What `torchrec_qr.compress_` is given. Its docstring has the fields."""

    partitions: PartitionSpec | None
    operation: Operation
    min_rows: int
    tables: Mapping[str, PartitionSpec | None]
    budget: int | None
    fit: bool

    def __post_init__(self) -> None:
        if not isinstance(self.tables, Mapping):
            raise TypeError(f"{_OWNER}: tables={self.tables!r}; allowed: None or a mapping of names to specs and None")
        if self.operation not in get_args(Operation):
            raise ValueError(f"{_OWNER}: operation={self.operation!r}; allowed: {', '.join(get_args(Operation))}")
        if self.partitions is not None and self.budget is not None:
            raise ValueError(
                f"{_OWNER}: partitions={self.partitions} and budget={self.budget} are both given, and each chooses the "
                "compression; allowed: one of them"
            )
        if self.partitions is None and self.budget is None and not self.tables:
            raise ValueError(f"{_OWNER}: nothing chooses a compression; allowed: partitions, budget or tables")
        checked_between(_OWNER, "min_rows", self.min_rows, 0, None)
        if self.budget is not None:
            checked_between(_OWNER, "budget", self.budget, 1, None)
            if self.operation == "path":
                raise ValueError(
                    f"{_OWNER}: operation='path' with budget={self.budget}: more collisions need more MLPs, and so may "
                    "store more; allowed: partitions or tables with path"
                )
        for owner, spec in [("partitions", self.partitions), *((f"tables[{n!r}]", s) for n, s in self.tables.items())]:
            if spec is not None and not isinstance(spec, PartitionSpec):
                raise TypeError(
                    f"{_OWNER}: {owner}={spec!r}; allowed: None or a spec, such as QuotientRemainder(num_collisions=4)"
                )

    def chosen(self, found: Sequence[FoundCollection]) -> list[list[BaseEmbeddingConfig]]:
        """Returns the configs of the tables of each collection, in order. That of a table that stays is its own.

        Raises:
            ValueError: a name in ``tables`` is unknown, a rule does not shrink a table, no table has as many rows as
                ``min_rows``, or the budget is too small. Also what `CompositionalEmbeddingBagConfig` raises.
        """
        self._check_names(found)
        limit = self._row_limit(found)
        chosen = [[self._of(collection, config, limit) for config in collection.configs] for collection in found]
        if self.budget is None and not any(map(newly_compositional, found, chosen)):
            sizes = {
                c.name: c.num_embeddings for collection in found if not collection.is_ours for c in collection.configs
            }
            ours = [c.name for collection in found if collection.is_ours for c in collection.configs]
            stay = f"; tables of our collections stay as they are: {', '.join(ours)}" if ours else ""
            raise ValueError(
                f"{_OWNER}: no table is compressed by partitions={self.partitions}, min_rows={self.min_rows} and "
                f"tables={dict(self.tables)}; TorchRec's tables have the rows {sizes}{stay}; allowed: a rule for one "
                "of them at least"
            )
        return chosen

    def _check_names(self, found: Sequence[FoundCollection]) -> None:
        known = {config.name: collection for collection in found for config in collection.configs}
        for name in self.tables:
            if name not in known:
                close = get_close_matches(str(name), known, 3)
                raise ValueError(
                    f"{_OWNER}: tables has {name!r}, which is no table of the model; allowed: "
                    f"{', '.join(close or known)}{', …' if close and len(close) < len(known) else ''}"
                )
            if known[name].is_ours and self.tables[name] is not None:
                raise ValueError(
                    f"{_OWNER}: tables has {name!r}, which is in {known[name].path!r}, a "
                    f"{type(known[name].module).__name__} already; allowed: tables of TorchRec's collections"
                )

    def _row_limit(self, found: Sequence[FoundCollection]) -> int | None:
        """Returns the greatest number of rows under which all tables fit the budget; None without one."""
        if self.budget is None:
            return None
        tables = [(collection, config) for collection in found for config in collection.configs]
        free = [config.num_embeddings for collection, config in tables if self._is_free(collection, config)]

        def total(limit: int) -> int:
            return sum(stored_bytes(self._of(collection, config, limit)) for collection, config in tables)

        def fits(limit: int) -> bool:
            assert self.budget is not None
            return total(limit) <= self.budget

        if (limit := highest_row_limit(free or [1], fits)) is None:
            raise ValueError(
                f"{_OWNER}: budget={self.budget} bytes is too small: with the least rows that keep ids apart, ⌈2√S⌉, "
                f"in each of the {len(free)} tables that may be compressed, all tables store {total(LEAST_LIMIT)} "
                "bytes; allowed: a larger budget, a smaller min_rows, or rules in tables that store less"
            )
        return limit

    def _is_free(self, collection: FoundCollection, config: BaseEmbeddingConfig) -> bool:
        """Returns whether no rule but ``partitions`` or ``budget`` chooses how a table is stored."""
        return not collection.is_ours and config.name not in self.tables and config.num_embeddings >= self.min_rows

    def _of(self, collection: FoundCollection, config: BaseEmbeddingConfig, limit: int | None) -> BaseEmbeddingConfig:
        """Returns the config of one table, under a limit of rows if a budget chooses."""
        name, spec = collection.named(config.name), self.tables.get(config.name)
        if self._is_free(collection, config):
            spec = self.partitions
            if limit is not None and config.num_embeddings > limit:
                spec = within_rows(config.num_embeddings, limit)
        if spec is None or collection.is_ours:
            return config
        new = self._composed(name, config, spec)
        shrinks = stored_bytes(new) < stored_bytes(config)
        if not shrinks and limit is not None and config.name not in self.tables:
            return config
        if not shrinks:
            raise ValueError(
                f"{_OWNER}: {name}: {spec} stores {new.physical_rows:,} rows, {stored_bytes(new):,} bytes, and the "
                f"table has {config.num_embeddings:,}, {stored_bytes(config):,} bytes; allowed: a spec that stores "
                f"less, tables={{{config.name!r}: None}}, or a larger min_rows"
            )
        return new

    def _composed(self, name: str, config: BaseEmbeddingConfig, spec: PartitionSpec) -> CompositionalConfig:
        if type(config) not in (EmbeddingBagConfig, EmbeddingConfig):
            raise TypeError(
                f"{_OWNER}: the config of {name} is a {type(config).__qualname__}; allowed: TorchRec's "
                "EmbeddingBagConfig and EmbeddingConfig themselves"
            )
        if not self.fit and _has_own_init(config):
            raise ValueError(
                f"{_OWNER}: {name} has an init_fn of its own, which fills a full table and not its partitions; "
                "allowed: weight_init_min and weight_init_max, fit=True, which starts from the table's rows, or "
                f"tables={{{config.name!r}: None}}"
            )
        pooled = isinstance(config, EmbeddingBagConfig)
        make: Any = CompositionalEmbeddingBagConfig if pooled else CompositionalEmbeddingConfig
        given = {f.name: getattr(config, f.name) for f in fields(config)}
        given |= {"feature_names": list(config.feature_names), "init_fn": None}
        composed: CompositionalConfig = make(**given, partitions=spec, operation=self.operation)
        return composed


def newly_compositional(found: FoundCollection, chosen: Sequence[BaseEmbeddingConfig]) -> list[CompositionalConfig]:
    """Returns the configs of the tables of a collection that become compositional."""
    return [] if found.is_ours else [config for config in chosen if is_compositional(config)]


def _has_own_init(config: BaseEmbeddingConfig) -> bool:
    """Returns whether a table starts other than TorchRec's do, which are uniform between the config's bounds."""
    init, bounds = config.init_fn, {"a": config.get_weight_init_min(), "b": config.get_weight_init_max()}
    is_default = isinstance(init, partial) and init.func is torch.nn.init.uniform_ and init.keywords == bounds
    return init is not None and not is_default
