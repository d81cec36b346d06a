"""The ``tables:`` section: one entry per table, from which TorchRec's and this library's configs are built."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)

from torchrec_qr.cli.schema.config_error import ConfigError, errors_in_file
from torchrec_qr.cli.schema.strict_loader import Range, dump, gather, load
from torchrec_qr.cli.schema.yaml_file import read_yaml
from torchrec_qr.configs import (
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    Init,
    Operation,
    PathActivation,
)
from torchrec_qr.id_hash import MAX_HASH_SEED, IdHash
from torchrec_qr.ids import OutOfRange
from torchrec_qr.no_full_table import NoFullTable
from torchrec_qr.partitions import (
    MAX_NUM_EMBEDDINGS,
    ChineseRemainder,
    ExplicitPartitions,
    HashPartition,
    MixedRadix,
    PartitionSpec,
    QuotientRemainder,
)

# Allow these keys only beside `partitions`, because they are about composition.
_COMPOSITIONAL_KEYS = (
    "partitions",
    "operation",
    "partition_dims",
    "path_hidden",
    "path_activation",
    "init",
    "out_of_range",
    "id_hash",
    "hash_seed",
)


@dataclass(frozen=True)
class TableSpec:
    """One entry of ``tables:``; without ``partitions`` a plain TorchRec table.

    The fields are those of `CompositionalEmbeddingBagConfig`, in YAML's terms.

    Args:
        name (str): of the table.
        num_embeddings (int): S, logical.
        embedding_dim (int): D.
        feature_names (tuple[str, ...] | None): default: one feature, called as the table.
        pooling (str): of a pooled table.
        data_type (str): of the stored rows.
        partitions (QuotientRemainder | MixedRadix | ChineseRemainder | ExplicitPartitions | HashPartition | None):
            which row of each partition an id selects; in YAML the ``kind`` and the fields of a spec.
        operation (Operation): with ``partitions`` only, as all below but the last two.
        partition_dims (tuple[int, ...] | None): D_j.
        path_hidden (int | None): width of the MLPs' hidden layer.
        path_activation (PathActivation): of that layer.
        init (Init): of the partitions.
        out_of_range (OutOfRange): policy for ids outside [0, S).
        id_hash (IdHash | None): the hash by which any id is valid.
        hash_seed (int): its seed.
        weight_init_min (float | None): replaces -1/√S.
        weight_init_max (float | None): replaces 1/√S.

    Raises:
        ConfigError: no features; a key that needs ``partitions``.

    Example:
        >>> spec = load(TableSpec, {"name": "user", "num_embeddings": 1_000_000, "embedding_dim": 64,
        ...                         "partitions": {"kind": "quotient_remainder", "compression": 4.0}})
        >>> config = spec.build()
        >>> config.feature_names, config.bound_partitions.sizes
        (['user'], (200000, 5))
    """

    name: str
    num_embeddings: Annotated[int, Range(1, MAX_NUM_EMBEDDINGS)]
    embedding_dim: Annotated[int, Range(1)]
    feature_names: tuple[str, ...] | None = None
    pooling: Literal["sum", "mean"] = "sum"
    data_type: Literal["fp32", "fp16", "bf16"] = "fp32"
    partitions: QuotientRemainder | MixedRadix | ChineseRemainder | ExplicitPartitions | HashPartition | None = None
    operation: Operation = "mult"
    partition_dims: tuple[int, ...] | None = None
    path_hidden: int | None = None
    path_activation: PathActivation = "relu"
    init: Init = "unit"
    out_of_range: OutOfRange = "error"
    id_hash: IdHash | None = None
    hash_seed: Annotated[int, Range(0, MAX_HASH_SEED)] = 0
    weight_init_min: float | None = None
    weight_init_max: float | None = None

    def __post_init__(self) -> None:
        if self.feature_names == ():
            raise ConfigError("feature_names", [], "at least one feature")
        if self.partitions is None:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for key in _COMPOSITIONAL_KEYS:
                if (given := getattr(self, key)) != defaults[key]:
                    raise ConfigError(key, given, f"only beside partitions, which table {self.name!r} lacks")

    def build(self, base_dir: str | Path | None = None) -> EmbeddingBagConfig | CompositionalEmbeddingBagConfig:
        """Returns the config of a pooled table.

        Args:
            base_dir (str | Path | None): to which the path of an explicit map is relative; default: the working
                directory.

        Raises:
            ConfigError: the partitions or the config refuse the values; names the table.
        """
        pooling = PoolingType[self.pooling.upper()]
        return self._build(
            partial(EmbeddingBagConfig, pooling=pooling),
            partial(CompositionalEmbeddingBagConfig, pooling=pooling),
            base_dir,
        )

    def build_sequence(self, base_dir: str | Path | None = None) -> EmbeddingConfig | CompositionalEmbeddingConfig:
        """Returns the config of a table that is looked up without pooling; see `build`, also for errors."""
        if self.pooling != "sum":
            raise ConfigError("pooling", self.pooling, f"none, as table {self.name!r} is not pooled")
        return self._build(EmbeddingConfig, CompositionalEmbeddingConfig, base_dir)

    def _build(self, plain: Any, compositional: Any, base_dir: str | Path | None) -> Any:
        fields: dict[str, Any] = {
            "name": self.name,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "feature_names": list(self.feature_names or (self.name,)),
            "data_type": DataType[self.data_type.upper()],
            "weight_init_min": self.weight_init_min,
            "weight_init_max": self.weight_init_max,
        }
        if self.partitions is None:
            return plain(**fields)
        fields |= {key: getattr(self, key) for key in _COMPOSITIONAL_KEYS}
        if self.partition_dims is not None:
            fields["partition_dims"] = list(self.partition_dims)
        if isinstance(self.partitions, ExplicitPartitions) and self.partitions.file is not None:
            file = str(Path(base_dir or ".") / self.partitions.file)
            fields["partitions"] = dataclasses.replace(self.partitions, file=file)
        try:
            return compositional(**fields)
        except (ValueError, TypeError) as error:
            at = "" if self._binds(fields["partitions"]) else "partitions"
            raise ConfigError(at, dump(self, defaults=False), str(error), str(error)) from error

    def _binds(self, partitions: PartitionSpec) -> bool:
        try:
            partitions.bind(self.num_embeddings)
        except (ValueError, TypeError):
            return False
        return True


def build_tables(
    specs: Sequence[TableSpec], base_dir: str | Path | None = None
) -> list[EmbeddingBagConfig | CompositionalEmbeddingBagConfig]:
    """Returns the configs of pooled tables, as ``TableSpec.build`` does, and checks that each has a name of its own.

    Raises:
        ConfigError: all errors of all tables together, at ``tables[<i>]``.

    Example:
        >>> hashed = HashPartition(compression=10.0)
        >>> configs = build_tables([TableSpec("user", 1000, 8, partitions=hashed), TableSpec("country", 250, 8)])
        >>> [type(config).__name__ for config in configs]
        ['CompositionalEmbeddingBagConfig', 'EmbeddingBagConfig']
    """
    count = Counter(spec.name for spec in specs)

    def build(i: int, spec: TableSpec) -> EmbeddingBagConfig | CompositionalEmbeddingBagConfig:
        try:
            if count[spec.name] > 1:
                others = ", ".join(f"tables[{j}]" for j, s in enumerate(specs) if s.name == spec.name and j != i)
                raise ConfigError("name", spec.name, f"a name of its own, which {others} has too")
            return spec.build(base_dir)
        except ConfigError as error:
            raise error.under(f"tables[{i}]") from None

    return gather(partial(build, i, spec) for i, spec in enumerate(specs))


def load_tables(
    given: Mapping[str, Any] | Sequence[Any], base_dir: str | Path | None = None
) -> list[EmbeddingBagConfig | CompositionalEmbeddingBagConfig]:
    """Returns the configs of pooled tables that a ``tables:`` section describes.

    Args:
        given (Mapping[str, Any] | Sequence[Any]): the section's list, or a mapping with the key ``tables``, whose other
            keys are ignored.
        base_dir (str | Path | None): to which paths of explicit maps are relative; default: the working directory.

    Raises:
        ConfigError: with the path of every key that is wrong, from ``tables`` on.

    Example:
        >>> load_tables([{"name": "user", "num_embeddings": 1000, "embeding_dim": 8}])
        Traceback (most recent call last):
        torchrec_qr.cli.schema.config_error.ConfigError: 2 errors
          tables[0].embeding_dim: unknown key; did you mean 'embedding_dim'?
          tables[0].embedding_dim: missing, and has no default
        >>> qr = {"kind": "quotient_remainder", "num_collisions": 0}
        >>> load_tables([{"name": "user", "num_embeddings": 1000, "embedding_dim": 8, "partitions": qr}])
        Traceback (most recent call last):
        torchrec_qr.cli.schema.config_error.ConfigError: tables[0].partitions: table 'user': QuotientRemainder:
        num_collisions must be between 1 and 1000 (num_embeddings), got 0
    """
    if isinstance(given, Mapping):
        if "tables" not in given:
            raise ConfigError("tables", None, "a list of tables", "missing, and has no default")
        given = given["tables"]
    return build_tables(load(list[TableSpec], given, "tables"), base_dir)


def read_tables(path: str | Path) -> list[EmbeddingBagConfig | CompositionalEmbeddingBagConfig]:
    """Returns the configs of pooled tables of a YAML file's ``tables:`` section; its other sections are ignored.

    Paths of explicit maps are relative to the file.

    Raises:
        ConfigError: headed by the file's name.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w") as file:
        ...     print("tables: [{name: user, num_embeddings: 1_000, embedding_dim: 8}]", file=file, flush=True)
        ...     [(table.name, table.num_embeddings) for table in read_tables(file.name)]
        [('user', 1000)]
    """
    sections = read_yaml(path)
    with errors_in_file(path):
        return load_tables(sections, base_dir=Path(path).parent)


def to_spec(config: BaseEmbeddingConfig) -> TableSpec:
    """Returns the entry of ``tables:`` from which an equal config is built.

    Raises:
        ValueError: classes that are in no file, or a field that the section cannot express, such as ``init_fn``.

    Example:
        >>> from torchrec_qr import MixedRadix
        >>> config = CompositionalEmbeddingBagConfig(name="t_user", feature_names=["user"], num_embeddings=1000,
        ...     embedding_dim=8, partitions=MixedRadix(balanced=True, num_partitions=3), operation="add")
        >>> import yaml
        >>> print(yaml.safe_dump([dump(to_spec(config), defaults=False)], sort_keys=False), end="")
        - name: t_user
          num_embeddings: 1000
          embedding_dim: 8
          feature_names:
          - user
          partitions:
            kind: mixed_radix
            balanced: true
            num_partitions: 3
          operation: add
    """
    fields = {field.name for field in dataclasses.fields(TableSpec)}
    entry: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in fields:
            entry[field.name] = value
        elif value != field.default and not (field.name == "init_fn" and _is_default_init(config)):
            raise ValueError(f"table {config.name!r}: {field.name}={value!r} cannot be expressed in YAML")
    entry["data_type"] = config.data_type.name.lower()
    if entry["feature_names"] == [config.name]:
        del entry["feature_names"]
    if "pooling" in entry:
        entry["pooling"] = entry["pooling"].name.lower()
    if (partitions := entry.get("partitions")) is not None:
        if isinstance(partitions, ExplicitPartitions) and partitions.file is None:
            raise ValueError(
                f"table {config.name!r}: classes in memory cannot be expressed in YAML; save them as a .npy file and "
                "use ExplicitPartitions(file=...)"
            )
        entry["partitions"] = dump(partitions)
    return load(TableSpec, entry, f"table {config.name!r}")


def _is_default_init(config: BaseEmbeddingConfig) -> bool:
    """Returns whether a table's ``init_fn`` is the one that the config has if none is given."""
    if isinstance(fn := config.init_fn, NoFullTable):
        return True
    if not isinstance(fn, partial):
        return False
    bounds = {"a": config.get_weight_init_min(), "b": config.get_weight_init_max()}
    return fn.func is nn.init.uniform_ and not fn.args and fn.keywords == bounds
