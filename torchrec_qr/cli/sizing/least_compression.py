"""The least compression under which a model fits a cluster."""

import yaml
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_qr.cli.schema import dump, to_spec
from torchrec_qr.cli.sizing.sized_job import Sizing, composed, full, is_given_map, is_hashed
from torchrec_qr.configs import CompositionalEmbeddingBagConfig
from torchrec_qr.partitions.row_limit import highest_row_limit, within_rows


def fit(sizing: Sizing) -> tuple[int, Sizing]:
    """Returns the rows that no table exceeds, as many as fit, and the tables so.

    The largest tables are compressed first, and alone if that is enough. A table of S rows keeps min(S, C) of them, and
    C is the greatest of which a plan exists. Tables of explicit maps and of hashed ids are kept.

    Raises:
        ValueError: the least rows of all tables, ⌈2√S⌉ each, do not fit.
    """
    sizes = [_kept_rows(table) or table.num_embeddings for table in sizing.tables]

    def limited(rows: int) -> Sizing:
        return sizing.of_tables([_limited(table, rows) for table in sizing.tables])

    rows = highest_row_limit(sizes, lambda rows: limited(rows).fits())
    if rows is None:
        raise ValueError(
            f"no compression fits {sizing.spec.topology}: not even with ⌈2√S⌉ rows in each table, the least that keep "
            "its S ids apart; allowed: more ranks, more memory, a smaller batch"
        )
    return rows, limited(rows)


def as_yaml(sizing: Sizing, rows: int) -> str:
    """Returns the ``tables:`` section, with a comment on the compression above it."""
    spec = sizing.spec
    compressed = [table for table in sizing.tables if hasattr(table, "partitions") and not is_hashed(table)]
    head = [
        f"# Least compression that fits {spec.topology} {spec.device}, batch {spec.batch_size}, {sizing.optimizer}.",
        f"# Threshold {rows:,} rows: {len(compressed)} of {len(sizing.tables)} tables have more, and keep as many.",
    ]
    entries = [dump(to_spec(table), defaults=False) for table in sizing.tables if not is_given_map(table)]
    kept = [table.name for table in sizing.tables if is_given_map(table)]
    if kept:
        head.append(f"# Of explicit maps, which stay as they are in {sizing.name}: {', '.join(kept)}")
    hashed = [table.name for table in sizing.tables if is_hashed(table)]
    if hashed:
        head.append(f"# Tables of hashed ids keep their rows: {', '.join(hashed)}")
    body: str = yaml.safe_dump({"tables": entries}, sort_keys=False, width=100, default_flow_style=None)
    return "\n".join([*head, body])


def _kept_rows(table: EmbeddingBagConfig) -> int | None:
    """Returns the rows of a table of hashed ids, whose S is not the number of ids."""
    return table.physical_rows if isinstance(table, CompositionalEmbeddingBagConfig) and is_hashed(table) else None


def _limited(table: EmbeddingBagConfig, rows: int) -> EmbeddingBagConfig:
    if is_given_map(table) or is_hashed(table):
        return table
    if table.num_embeddings <= rows:
        return full(table)
    return composed(table, within_rows(table.num_embeddings, rows))
