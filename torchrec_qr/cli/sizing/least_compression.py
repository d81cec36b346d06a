"""The least compression under which a model fits a cluster."""

import math
from bisect import bisect_left

import yaml
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_qr.cli.schema import dump, to_spec
from torchrec_qr.cli.sizing.sized_job import Sizing, composed, full, is_given_map
from torchrec_qr.partitions import QuotientRemainder
from torchrec_qr.planner.fit_advice import within_rows


def fit(sizing: Sizing) -> tuple[int, Sizing]:
    """Returns the rows that no table exceeds, as many as fit, and the tables so.

    The largest tables are compressed first, and alone if that is enough. A table of S rows keeps min(S, C) of them, and
    C is the greatest of which a plan exists. Tables of explicit maps are kept.

    Raises:
        ValueError: the least rows of all tables, ⌈2√S⌉ each, do not fit.
    """
    largest = max(table.num_embeddings for table in sizing.tables)
    least = QuotientRemainder(balanced=True).bind(largest).num_rows

    def limited(rows: int) -> Sizing:
        return sizing.of_tables([_limited(table, rows) for table in sizing.tables])

    if limited(largest).fits():
        return largest, limited(largest)
    if not limited(least).fits():
        raise ValueError(
            f"no compression fits {sizing.spec.topology}: not even with at most {least:,} rows in each table, the "
            "least that keep the ids of the largest apart; allowed: more ranks, more memory, a smaller batch"
        )
    # Search to a thousandth, because the exact number of rows would take as many plans again.
    steps = [round(least * 1.001**k) for k in range(math.ceil(math.log(largest / least, 1.001)))]
    rows = steps[bisect_left(steps, True, lo=1, key=lambda rows: not limited(rows).fits()) - 1]
    return rows, limited(rows)


def as_yaml(sizing: Sizing, rows: int) -> str:
    """Returns the ``tables:`` section, with a comment on the compression above it."""
    spec = sizing.spec
    compressed = [table for table in sizing.tables if hasattr(table, "partitions")]
    head = [
        f"# Least compression that fits {spec.topology} {spec.device}, batch {spec.batch_size}, {sizing.optimizer}.",
        f"# Threshold {rows:,} rows: {len(compressed)} of {len(sizing.tables)} tables have more, and keep as many.",
    ]
    entries = [dump(to_spec(table), defaults=False) for table in sizing.tables if not is_given_map(table)]
    kept = [table.name for table in sizing.tables if is_given_map(table)]
    if kept:
        head.append(f"# Of explicit maps, which stay as they are in {sizing.name}: {', '.join(kept)}")
    body: str = yaml.safe_dump({"tables": entries}, sort_keys=False, width=100, default_flow_style=None)
    return "\n".join([*head, body])


def _limited(table: EmbeddingBagConfig, rows: int) -> EmbeddingBagConfig:
    if is_given_map(table):
        return table
    if table.num_embeddings <= rows:
        return full(table)
    return composed(table, within_rows(table.num_embeddings, rows))
