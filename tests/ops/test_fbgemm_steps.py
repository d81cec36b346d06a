"""Ten steps of a plain table by FBGEMM's CPU kernels, and of the same rows by ours.

FBGEMM's fast kernel of rowwise Adagrad drops weight decay. A table of two features takes the other one, which has it.
"""

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from kernel_reference import one_table
from near import assert_near
from torch import Tensor

from torchrec_qr.distributed.fused_params import update_rule
from torchrec_qr.ops.arguments import Batch
from torchrec_qr.ops.lookup import stepped_lookup
from torchrec_qr.ops.update_rules import Update, UpdateRule

ROWS, DIM = 30, 16
DECAY = {"weight_decay": 0.5}
L2, DECOUPLE = ({**DECAY, "weight_decay_mode": mode} for mode in (WeightDecayMode.L2, WeightDecayMode.DECOUPLE))


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ids and offsets of two features, and the gradient of the output. The last bag's is zero; few rows are used."""
    generator, out = torch.Generator().manual_seed(4), []
    for _ in range(10):
        ids = torch.randint(0, ROWS - 8, (12,), generator=generator)
        gradient = torch.randn(2, 2 * DIM, generator=generator)
        gradient[1, DIM:] = 0
        out.append((ids, torch.tensor([0, 3, 3, 9, 12]), gradient))
    return out


def by_fbgemm(weight: Tensor, kind: EmbOptimType, params: dict[str, Any]) -> list[Tensor]:
    """Returns the rows and the state after ten steps."""
    specs = [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        specs, feature_table_map=[0, 0], optimizer=kind, learning_rate=0.1, eps=1e-3, **params
    )
    tables.split_embedding_weights()[0].data.copy_(weight)
    for ids, offsets, gradient in batches():
        tables(ids, offsets).backward(gradient)
    states = [] if kind == EmbOptimType.EXACT_SGD else tables.split_optimizer_states()[0]
    return [tables.split_embedding_weights()[0].detach(), *states]


def by_ours(weight: Tensor, rule: UpdateRule) -> list[Tensor]:
    tables, _ = one_table(ROWS, DIM, num_features=2)
    own = weight.clone().requires_grad_()
    state = {name: torch.zeros(shape) for name, shape in rule.state_shapes(ROWS, DIM).items()}
    for ids, offsets, gradient in batches():
        update = Update(rule, state, rule.learning_rate)
        stepped_lookup(tables, [own], Batch(ids, offsets, None, True), lambda u=update: [u]).backward(gradient)
    return [own.detach(), *state.values()]


KINDS = EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD


@pytest.mark.parametrize(
    ("kind", "params"), [*((kind, {}) for kind in KINDS), (KINDS[2], L2), (KINDS[2], DECOUPLE)], ids=str
)
def test_ten_steps_are_fbgemms(kind: EmbOptimType, params: dict[str, Any]) -> None:
    weight = torch.linspace(-1, 1, ROWS * DIM).view(ROWS, DIM)
    expected = by_fbgemm(weight, kind, params)
    found = by_ours(weight, update_rule("t", {"optimizer": kind, "learning_rate": 0.1, "eps": 1e-3, **params}))
    for actual, of in zip(found, expected, strict=True):
        assert_near(actual, of.double(), 1e-5)
    assert torch.equal(found[0][ROWS - 8 :], weight[ROWS - 8 :])


@pytest.mark.parametrize(
    ("kind", "params"), [(KINDS[0], L2), (KINDS[1], L2), (KINDS[1], DECOUPLE), (KINDS[2], DECAY)], ids=str
)
def test_fbgemm_drops_the_decay_that_compositional_tables_have_or_refuse(
    kind: EmbOptimType, params: dict[str, Any]
) -> None:
    weight = torch.linspace(-1, 1, ROWS * DIM).view(ROWS, DIM)
    for with_decay, without in zip(by_fbgemm(weight, kind, params), by_fbgemm(weight, kind, {}), strict=True):
        assert torch.equal(with_decay, without)
