"""The tables of a job, such that its optimizer has a rule for each."""

from pathlib import Path

from torchrec import EmbeddingBagConfig

from launch.config import Job
from torchrec_qr import CompositionalEmbeddingBagConfig, MixedRadix
from torchrec_qr.schema import build_tables

_OURS_ALONE = ("adam", "amsgrad")


def job_tables(job: Job, folder: Path) -> list[EmbeddingBagConfig]:
    """Returns the configs of ``job.tables``; files that they name are relative to ``folder``.

    Under Adam and AMSGrad a plain table becomes a compositional one of a single partition, p(x) = x, which is the same
    function: FBGEMM has no AMSGrad, and no Adam on a CPU.
    """
    tables = build_tables(job.tables, folder)
    if job.optimizer.sparse.name not in _OURS_ALONE:
        return tables
    return [t if isinstance(t, CompositionalEmbeddingBagConfig) else _single_partition(t) for t in tables]


def _single_partition(table: EmbeddingBagConfig) -> CompositionalEmbeddingBagConfig:
    rows = table.num_embeddings
    return CompositionalEmbeddingBagConfig(
        name=table.name,
        feature_names=table.feature_names,
        num_embeddings=rows,
        embedding_dim=table.embedding_dim,
        data_type=table.data_type,
        pooling=table.pooling,
        init_fn=table.init_fn,
        partitions=MixedRadix(rows, (rows,)),
    )
