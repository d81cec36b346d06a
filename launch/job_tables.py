"""The tables of a job, such that its optimizer has a rule for each."""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from torch import nn
from torchrec import EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType

from launch.config import Job
from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, MixedRadix
from torchrec_qr.cli.schema import build_tables

_OURS_ALONE = ("adam", "amsgrad", "partial_rowwise_adam", "lamb", "partial_rowwise_lamb")


def job_tables(job: Job, folder: Path) -> list[EmbeddingBagConfig]:
    """Returns the configs of ``job.tables``; files that they name are relative to ``folder``.

    TorchRec's kernels would not train some plain tables alike everywhere. Such a table becomes a compositional one of a
    single partition, p(x) = x, which is the same function. FBGEMM has no AMSGrad, and on a CPU no Adam, LAMB and bf16.
    It drops the weight decay of SGD and Adagrad, and a data-parallel table of its own would decay in all of its rows.
    A data-parallel table in fp16 would be stepped in fp16, where an eps of 1e-8 is 0. None of TorchRec's own can be
    frozen.
    """
    return [_single_partition(t) if _is_ours(t, job) else t for t in build_tables(job.tables, folder)]


def _is_ours(table: EmbeddingBagConfig, job: Job) -> bool:
    if isinstance(table, CompositionalEmbeddingBagConfig):
        return False
    rule = job.optimizer.sparse
    is_ours_alone = rule.name in _OURS_ALONE or rule.weight_decay > 0
    return is_ours_alone or table.name in job.train.frozen or table.data_type != DataType.FP32


def freeze(model: nn.Module, names: Collection[str]) -> None:
    """Freezes the tables of these names; must come before the model is sharded."""
    for module in model.modules():
        if isinstance(module, CompositionalEmbeddingBagCollection):
            for name in names:
                module.embedding_bags[name].requires_grad_(False)


def _single_partition(table: EmbeddingBagConfig) -> CompositionalEmbeddingBagConfig:
    given = {field.name: getattr(table, field.name) for field in fields(table) if field.init}
    return CompositionalEmbeddingBagConfig(**given, partitions=MixedRadix(sizes=[table.num_embeddings]))
