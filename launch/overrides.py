"""``--set model.embedding_dim=32``: a key of a config, by its path, and its value in YAML."""

from collections.abc import Iterable
from typing import Any

from torchrec_qr.cli.schema import ConfigError
from torchrec_qr.cli.schema.key_paths import copied, places
from torchrec_qr.cli.schema.yaml_file import read_value


def override(sections: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of ``sections`` with the values of ``assignments``, each ``path=value``, later ones winning.

    It does not check keys and values, because `launch.config` does.

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
