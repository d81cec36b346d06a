"""Gradient accumulation: fused optimizers step in every backward, of compositional tables as of TorchRec's own."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from assert_all_close import assert_all_close
from global_batches import batch_of
from placements import BASIC_SHARDINGS, plan_of
from ranks import run_ranks
from sharded_model import (
    ADAGRAD,
    EPS,
    LR,
    NUM_IDS,
    ROWWISE,
    SGD,
    Scaled,
    distributed,
    plain_named,
    shard,
    state_of,
    table,
    tables,
    unsharded,
    weights_of,
)
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, row_wise, table_wise

from torchrec_qr import HashPartition

MICRO_BATCHES, WINDOWS = 3, 2
# TorchRec's own data-parallel tables are left to a dense optimizer, whatever is attached to them.
PLACES = {
    "tw": table_wise(rank=1, compute_kernel="fused"),
    "cw": column_wise(ranks=[0, 1], compute_kernel="fused"),
    "rw": row_wise(compute_kernel="fused"),
}


def full_table(name: str) -> Any:
    """One partition of a row per id: what a plain table is."""
    return table(name, HashPartition(rows=NUM_IDS), "mult")


def stock(optimizer: Any, values: dict[str, Tensor]) -> DistributedModelParallel:
    """TorchRec's collection of plain tables with the same values, under the same plan."""
    collection = EmbeddingBagCollection(tables=[plain_named(n) for n in PLACES], device=torch.device("meta"))
    sharder = EmbeddingBagCollectionSharder({"optimizer": optimizer, "learning_rate": LR, "eps": EPS})
    model = distributed(Scaled(collection), plan_of(collection, PLACES, sharder), [sharder])
    model.load_state_dict(
        {f"collection.embedding_bags.{n}.weight": v for n, v in values.items()} | {"scale": torch.ones(1)}
    )
    return model


def in_turn(model: nn.Module, batches: list[Any]) -> list[Tensor]:
    outputs = []
    for batch in batches:
        out = model(batch)
        ((out * (out - 1)).mean() / len(batches)).backward()
        outputs.append(out.detach())
    return outputs


def forwards_first(model: nn.Module, batches: list[Any]) -> list[Tensor]:
    outputs = [model(batch) for batch in batches]
    for out in outputs:
        ((out * (out - 1)).mean() / len(batches)).backward()
    return [out.detach() for out in outputs]


def in_one(model: nn.Module, batches: list[Any]) -> list[Tensor]:
    outputs = [model(batch) for batch in batches]
    torch.stack([(out * (out - 1)).mean() for out in outputs]).mean().backward()
    return [out.detach() for out in outputs]


def accumulate(model: Any, configs: list[Any], how: Callable[..., list[Tensor]]) -> list[Tensor]:
    """The usual loop: gradients are cleared before, and the optimizer steps after, a window of micro-batches."""
    outputs = []
    for window in range(WINDOWS):
        steps = range(window * MICRO_BATCHES, (window + 1) * MICRO_BATCHES)
        batches = [batch_of(configs, step, dist.get_rank(), dist.get_world_size()) for step in steps]
        model.fused_optimizer.zero_grad()
        outputs += how(model, batches)
        model.fused_optimizer.step()
    return outputs


def beside_stock(rank: int, world_size: int) -> None:
    configs = [full_table(name) for name in PLACES]
    start = unsharded(configs)
    values = {n: start.state_dict()[f"collection.embedding_bags.{n}.partition_0.weight"].clone() for n in PLACES}
    for optimizer in (SGD, ADAGRAD, ROWWISE):
        after = {}
        for how in (in_turn, forwards_first):
            ours, theirs = shard(configs, PLACES, optimizer, start), stock(optimizer, values)
            outputs, expected = (accumulate(model, configs, how) for model in (ours, theirs))
            what = f"{optimizer}, {how.__name__}"
            torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6, msg=lambda m, w=what: f"{w}: {m}")
            after[how] = weights_of(ours)
            own = {n: v for n, v in after[how].items() if not n.endswith("fingerprint")}
            expected_weights = {n.replace(".weight", ".partition_0.weight"): v for n, v in weights_of(theirs).items()}
            assert_all_close(own, expected_weights, what, 1e-5, 1e-6)
        if optimizer == SGD:
            continue  # linear in the gradients, so that few steps and one are too near to be told apart
        # Which this test would not see, were steps put off to the end of a window.
        once = shard(configs, PLACES, optimizer, start)
        accumulate(once, configs, in_one)
        for name, value in weights_of(once).items():
            if name != "scale" and not name.endswith("fingerprint"):
                assert (value - after[in_turn][name]).abs().max() > 1e-4, (optimizer, name)


def test_micro_batches_do_what_they_do_to_torchrecs_tables() -> None:
    run_ranks(beside_stock, 2)


def every_step(rank: int, world_size: int) -> None:
    configs = tables()
    for sharding in BASIC_SHARDINGS:
        window, steps = (shard(configs, sharding, ADAGRAD, unsharded(configs)) for _ in range(2))
        accumulate(window, configs, in_turn)
        kept = [name for name, p in window.named_parameters() if ".partition_" in name and p.grad is not None]
        assert kept == [], "gradients that were stepped in backward must not wait for the next"
        for step in range(MICRO_BATCHES * WINDOWS):
            steps.fused_optimizer.zero_grad()
            out = steps(batch_of(configs, step, rank, world_size))
            ((out * (out - 1)).mean() / MICRO_BATCHES).backward()
            steps.fused_optimizer.step()
        for of in (weights_of, state_of):
            assert_all_close(of(window), of(steps), sharding)


def test_a_window_of_micro_batches_is_as_many_steps() -> None:
    """Of several partitions, replicated ones too."""
    run_ranks(every_step, 2)
