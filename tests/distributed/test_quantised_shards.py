"""A sharded model is not quantised: its weights lie on several ranks."""

import pytest
import torch
from ranks import run_ranks
from sharded_model import shard, two_tables

from torchrec_qr.inference import quantize_embeddings


def _refused(rank: int, world_size: int) -> None:
    dmp = shard(two_tables(), "table_wise")
    with pytest.raises(ValueError, match=r"module '.*collection' \(Sharded.*\): it is sharded; allowed: an unsharded"):
        quantize_embeddings(dmp, torch.qint8)


def test_a_sharded_model_is_refused() -> None:
    run_ranks(_refused, 2)
