"""A plan that is carried out on the meta device: the layout of a state dict, without memory."""

from typing import Any

import pytest
import torch
from placements import BASIC_SHARDINGS, placements, plan_of
from ranks import run_ranks
from sharded_model import ADAGRAD, NUM_IDS, Model, plain_named, sequences, sharders_of, tables
from single_tables import collection_of
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, table_wise
from torchrec.distributed.types import ShardingPlan

CPU, META = torch.device("cpu"), torch.device("meta")


def on(
    device: torch.device, configs: list[Any], generators: Any, start: torch.device = META
) -> DistributedModelParallel:
    """The model, whose plan is for the CPU, on another device; ``start`` is the device of the unsharded module."""
    collection = collection_of(configs, start)
    sharders = sharders_of({"optimizer": ADAGRAD, "learning_rate": 0.1})
    sharder = next(s for s in sharders if s.module_type is type(collection))
    plan = ShardingPlan({"collection": plan_of(collection, generators, sharder)})
    return DistributedModelParallel(Model(collection), device=device, plan=plan, sharders=sharders)


def layout(state: dict[str, Any]) -> dict[str, Any]:
    """Sizes and types by name, and where the shards of a sharded tensor lie; on the meta device all of them do."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        shards = None
        if isinstance(value, ShardedTensor):
            metadata = value.metadata().shards_metadata
            shards = [(s.shard_offsets, s.shard_sizes, s.placement.rank()) for s in metadata]
            assert {s.placement.device() for s in metadata} == {s.tensor.device for s in value.local_shards()} | {
                s.placement.device() for s in metadata[:1]
            }
        found[name] = (tuple(value.size()), value.dtype, shards)
    return found


def layouts(rank: int, world_size: int) -> None:
    fused = {"plain": table_wise(rank=1, compute_kernel="fused")}
    own = [c for c in tables() if c.name != "plain"]
    cases: list[tuple[list[Any], dict[str, Any]]] = [
        ([*own, plain_named("plain")], placements(own, sharding) | fused) for sharding in BASIC_SHARDINGS
    ]
    of_sequences = [sequences(name) for name in ("a", "b")]
    plain: Any = EmbeddingConfig(name="plain", feature_names=["f_plain"], num_embeddings=NUM_IDS, embedding_dim=8)
    cases += [([*of_sequences, plain], placements(of_sequences, sharding) | fused) for sharding in BASIC_SHARDINGS]
    for configs, generators in cases:
        real = on(CPU, configs, generators)
        for start in (META, CPU):
            meta = on(META, configs, generators, start)
            assert layout(meta.state_dict()) == layout(real.state_dict())
            states, expected = (m.fused_optimizer.state_dict()["state"] for m in (meta, real))
            assert {name: layout(of) for name, of in states.items()} == {
                name: layout(of) for name, of in expected.items()
            }
            split = [v for v in meta.state_dict().values() if isinstance(v, ShardedTensor)]
            assert split
            assert all(s.tensor.is_meta for value in split for s in value.local_shards())


def test_the_layout_on_the_meta_device_is_that_on_a_cpu() -> None:
    run_ranks(layouts, 2)


def dense_on_meta(rank: int, world_size: int) -> None:
    generators = {"p": column_wise(ranks=[0, 0], compute_kernel="dense")}
    with pytest.raises(NotImplementedError, match=r"table 'p': .*'dense' \(column_wise\) .* the meta device"):
        on(META, [plain_named("p")], generators)


def test_plain_tables_with_the_dense_kernel_are_refused() -> None:
    run_ranks(dense_on_meta, 1)
