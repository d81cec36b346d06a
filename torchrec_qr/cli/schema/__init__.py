"""The YAML sections ``tables:`` and ``planner:``, and the strict loader that reads them and a job's own sections."""

from torchrec_qr.cli.schema.config_error import ConfigError
from torchrec_qr.cli.schema.planner_section import ConstraintSpec, PlannerSpec, read_planner
from torchrec_qr.cli.schema.strict_loader import Range, dump, load
from torchrec_qr.cli.schema.tables_section import TableSpec, build_tables, load_tables, read_tables, to_spec
from torchrec_qr.cli.schema.yaml_file import read_yaml

__all__ = [
    "ConfigError",
    "ConstraintSpec",
    "PlannerSpec",
    "Range",
    "TableSpec",
    "build_tables",
    "dump",
    "load",
    "load_tables",
    "read_planner",
    "read_tables",
    "read_yaml",
    "to_spec",
]
