"""A job as one YAML file: data, model, tables, planner, optimizer, schedule, train."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.sections import DataSection, ModelConfig, OptimizersSection, ScheduleSection, TrainSection
from torchrec_qr.cli.schema import ConfigError, PlannerSpec, TableSpec, dump, load, read_yaml
from torchrec_qr.cli.schema.config_error import errors_in_file
from torchrec_qr.cli.schema.key_paths import copied, places
from torchrec_qr.cli.schema.yaml_file import read_value


@dataclass(frozen=True)
class Job:
    """All sections. ``tables`` and ``planner`` are the library's own; the others are in `launch.sections`.

    Raises:
        ConfigError: sections that do not fit together: a feature without a table, or with two; a table whose dimension
            is not the model's; a constraint of the planner for a table that is not there; a vocabulary where every
            table takes raw ids; …
    """

    tables: tuple[TableSpec, ...]
    data: DataSection = field(default_factory=DataSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    planner: PlannerSpec = field(default_factory=PlannerSpec)
    optimizer: OptimizersSection = field(default_factory=OptimizersSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    train: TrainSection = field(default_factory=TrainSection)

    def __post_init__(self) -> None:
        errors = [*self._table_errors(), *self._feature_errors(), *self._raw_id_errors()]
        if self.model.dense_in_features != self.data.dense_inputs:
            flags = " and their missing flags" if self.data.missing_flags else ""
            allowed = f"{self.data.dense_inputs}, the dense features of data{flags}"
            errors.append(ConfigError("model.dense_in_features", self.model.dense_in_features, allowed))
        if self.planner.batch_size not in (None, self.train.batch_size):
            allowed = f"{self.train.batch_size}, as train.batch_size, or nothing"
            errors.append(ConfigError("planner.batch_size", self.planner.batch_size, allowed))
        for i, name in enumerate(self.train.frozen):
            if name not in (names := [table.name for table in self.tables]):
                errors.append(ConfigError(f"train.frozen[{i}]", name, f"names of tables: {', '.join(names)}"))
        try:
            self.planner.check_tables([table.name for table in self.tables])
        except ConfigError as error:
            errors.append(error)
        if errors:
            raise ConfigError.joined(errors)

    def tables_of_features(self) -> tuple[TableSpec, ...]:
        """Returns the table of each feature, in the order of ``data.features``."""
        of = {feature: table for table in self.tables for feature in features_of(table)}
        return tuple(of[feature] for feature in self.data.features)

    def rows_of_features(self) -> tuple[int, ...]:
        """Returns S of the table of each feature, in the order of ``data.features``."""
        return tuple(table.num_embeddings for table in self.tables_of_features())

    def mapped_features(self) -> tuple[str, ...]:
        """Returns the features whose values ``data.ids`` maps to rows; tables with an ``id_hash`` take them raw."""
        tables = zip(self.data.features, self.tables_of_features(), strict=True)
        return tuple(feature for feature, table in tables if table.id_hash is None)

    def _table_errors(self) -> Iterable[ConfigError]:
        names: list[str] = []
        for i, table in enumerate(self.tables):
            if table.name in names:
                yield ConfigError(
                    f"tables[{i}].name", table.name, f"another name than tables[{names.index(table.name)}]'s"
                )
            names.append(table.name)
            if table.embedding_dim != self.model.embedding_dim:
                allowed = f"{self.model.embedding_dim}, as model.embedding_dim"
                yield ConfigError(f"tables[{i}].embedding_dim", table.embedding_dim, allowed)

    def _feature_errors(self) -> Iterable[ConfigError]:
        table_of: dict[str, str] = {}
        for i, table in enumerate(self.tables):
            for feature in features_of(table):
                if feature in table_of and table_of[feature] != table.name:
                    allowed = f"each feature in one table, which for {feature!r} is {table_of[feature]!r}"
                    yield ConfigError(f"tables[{i}].feature_names", feature, allowed)
                elif feature not in self.data.features:
                    yield ConfigError(f"tables[{i}].feature_names", feature, "features that are in data.features")
                table_of[feature] = table.name
        for j, feature in enumerate(self.data.features):
            if feature not in table_of:
                yield ConfigError(f"data.features[{j}]", feature, "features that have a table in tables")

    def _raw_id_errors(self) -> Iterable[ConfigError]:
        raw = [table.name for table in self.tables if table.id_hash is not None]
        if not raw:
            return
        if len(raw) == len(self.tables):
            why = "because every table has an id_hash, and takes raw ids without a vocabulary"
            if self.data.ids == "vocabulary":
                yield ConfigError("data.ids", self.data.ids, f"'modulo' or 'encoded', {why}")
            if self.data.min_count != 1:
                yield ConfigError("data.min_count", self.data.min_count, f"1, {why}")
        elif self.data.ids == "vocabulary" and self.data.format == "npy" and self.data.vocabulary is None:
            allowed = (
                "'modulo' or 'encoded', or a file as data.vocabulary, because npy files have the numbers of a "
                f"vocabulary otherwise, and table {raw[0]!r} with its id_hash takes raw ids"
            )
            yield ConfigError("data.ids", self.data.ids, allowed)


def features_of(table: TableSpec) -> tuple[str, ...]:
    """Returns the features of a table: its name, if it names none."""
    return table.feature_names or (table.name,)


def read_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Returns the job of a YAML file, its values overridden by ``overrides``; see `override`.

    Raises:
        ConfigError: all errors together, each with the key's path and what is allowed; an unknown key with the nearest
            known one.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> table = "{name: cat, num_embeddings: 1000, embedding_dim: 16}"
        >>> data, model = "{features: [cat]}", "{bottom_mlp: [64, 16]}"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "job.yaml"
        ...     _ = file.write_text(f"tables: [{table}]\\ndata: {data}\\nmodel: {model}")
        ...     read_job(file, ["train.batch_size=64"]).train.batch_size
        64
    """
    sections = read_yaml(path)
    with errors_in_file(path):
        return load(Job, override(sections, overrides))


def override(sections: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of ``sections`` with the values of ``assignments``, each ``path=value``, later ones winning.

    It does not check keys and values, because `read_job` does.

    Raises:
        ConfigError: no ``=``, a value that is not YAML, or a path that leads nowhere: see `places`.

    Example:
        >>> job = {"model": {"embedding_dim": 16}, "tables": [{"embedding_dim": 16}, {"embedding_dim": 16}]}
        >>> override(job, ["model.embedding_dim=32", "tables[*].embedding_dim=32", "optimizer.sparse.lr=1e-3"])
        {'model': {'embedding_dim': 32}, 'tables': [{'embedding_dim': 32}, {'embedding_dim': 32}],
         'optimizer': {'sparse': {'lr': 0.001}}}
    """
    result: dict[str, Any] = copied(sections)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError("", assignment, "KEY=VALUE, such as model.embedding_dim=32 or tables[0].pooling=mean")
        for parent, key in places(result, path):
            parent[key] = read_value(path, text)
    return result


def write_job(job: Job) -> str:
    """Returns the YAML of which `read_job` makes an equal job, all defaults written out."""
    text = yaml.safe_dump(dump(job), sort_keys=False, width=120, default_flow_style=None)
    return str(text)
