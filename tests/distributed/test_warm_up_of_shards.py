"""Warming up a sharded model changes nothing of it; on a CPU it compiles nothing either."""

import pytest
from assert_all_close import assert_all_close
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from placements import BASIC_SHARDINGS
from ranks import run_ranks
from sharded_model import shard, state_of, tables, train, unsharded, weights_of

from torchrec_qr.distributed import lookup_kernel
from torchrec_qr.distributed.warm_up import warm_up


def warm_up_between_steps(rank: int, world_size: int, optimizer: EmbOptimType) -> int:
    calls = 0
    for plan in BASIC_SHARDINGS:
        models = [shard(tables(), plan, optimizer, values=unsharded(tables())) for _ in range(2)]
        given = []
        real, lookup_kernel.warm_up = lookup_kernel.warm_up, lambda *call, given=given: given.append(call)
        warm_up(models[0])
        lookup_kernel.warm_up = real
        calls += len(given)
        for described, weights, outcomes, pooled, weighted in given:
            assert pooled
            assert not weighted
            assert len(outcomes) == len(weights) == len(described.partitions)
            assert None not in outcomes
        for step in range(2):
            warm_up(models[0])
            for model in models:
                train(model, tables(), range(step, step + 1))
        for of in (weights_of, state_of):  # the number of Adam's steps among them
            assert_all_close(*map(of, models), plan)
    return calls


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.ADAM], ids=str)
def test_a_warm_up_changes_nothing(optimizer: EmbOptimType) -> None:
    assert all(run_ranks(warm_up_between_steps, 2, optimizer))
