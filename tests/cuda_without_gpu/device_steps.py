"""Steps of collections on fake CUDA tensors, and calls that are refused: a line of JSON for each."""

import ctypes
import json
import logging
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import fake_ranks
import torch
import torch.distributed as dist
from device_cases import UNSHARDED, DeviceCase, cases
from device_faults import FAULTS
from device_refusals import CALLS
from fake_cuda import FakeCuda
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from step_costs import WAITS
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed import sharding_plan
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingEnv,
    ShardMetadata,
)
from torchrec.modules.embedding_configs import DataType, PoolingType

import torchrec_qr
from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingCollection,
    CompositionalEmbeddingConfig,
    ExplicitPartitions,
    QuotientRemainder,
)
from torchrec_qr.distributed import (
    CompositionalEmbeddingBagCollectionSharder,
    CompositionalEmbeddingCollectionSharder,
)
from torchrec_qr.ops.triton_kernels.backward_launches import kept_on_device

NUM_IDS, DIM, BAGS = 100, 16, 8
FEATURES = {"first": ["a", "b"], "second": ["c"], "plain": ["d"]}
_CLASSES = torch.stack([torch.arange(NUM_IDS) % 12, torch.arange(NUM_IDS) // 12])


def configs(case: DeviceCase) -> list[Any]:
    """Compositional tables, the first of two features; a plain one beside."""
    partitions = {
        "strided": lambda: QuotientRemainder(num_collisions=7),
        "adjacent": lambda: QuotientRemainder(num_collisions=7, grouping="adjacent"),
        "explicit": lambda: ExplicitPartitions(_CLASSES),
    }[case.partitions]
    names = ["first", "second", *(f"table_{i}" for i in range(2, case.tables)), *(["plain"] if case.plain else [])]
    out = []
    for name in names:
        fields: dict[str, Any] = {"name": name, "num_embeddings": NUM_IDS, "embedding_dim": DIM}
        fields["feature_names"] = list(FEATURES.get(name, [name]))
        if case.pooled:
            fields["pooling"] = PoolingType[case.pooling]
        if name == "plain":
            out.append(EmbeddingBagConfig(**fields) if case.pooled else EmbeddingConfig(**fields))
            continue
        fields |= {"partitions": partitions(), "operation": case.operation, "path_hidden": case.hidden}
        fields |= {"out_of_range": case.out_of_range, "data_type": DataType[case.data_type]}
        out.append(CompositionalEmbeddingBagConfig(**fields) if case.pooled else CompositionalEmbeddingConfig(**fields))
    return out


def collection(case: DeviceCase, tables: list[Any], device: torch.device) -> nn.Module:
    if case.pooled:
        return CompositionalEmbeddingBagCollection(tables, case.weighted, device)
    return CompositionalEmbeddingCollection(tables, device)


def batch(case: DeviceCase, tables: list[Any], device: torch.device) -> KeyedJaggedTensor:
    """Bags of none to three ids, all in range."""
    keys = [f for config in tables for f in config.feature_names]
    dtype = torch.int32 if case.int32 else torch.int64
    lengths = torch.arange(len(keys) * BAGS, device=device, dtype=dtype) % 4
    total = sum(i % 4 for i in range(len(keys) * BAGS))
    values = torch.arange(total, device=device, dtype=dtype) * 37 % NUM_IDS
    weights = torch.ones(total, device=device) if case.weighted else None
    return KeyedJaggedTensor(keys=keys, values=values, lengths=lengths, weights=weights)


def plan(case: DeviceCase, module: nn.Module, sharder: Any) -> EmbeddingModuleShardingPlan:
    """The second table on the next rank or host, the others on this; none here if "elsewhere"."""
    out = EmbeddingModuleShardingPlan()
    parameters = sharder.shardable_parameters(module)
    for i, name in enumerate(parameters):
        at = 1 if case.home == "elsewhere" or i == 1 else 0
        make = {
            "table_wise": sharding_plan.table_wise(rank=at),
            "column_wise": sharding_plan.column_wise(ranks=[0, 1]),
            "table_column_wise": sharding_plan.column_wise(ranks=[0, 1]),
            "row_wise": sharding_plan.row_wise(compute_kernel="fused"),
            "table_row_wise": sharding_plan.table_row_wise(host_index=at),
            "grid_shard": _grid,
            "data_parallel": sharding_plan.data_parallel(),
        }[case.sharding]
        sharding = make(parameters[name], fake_ranks.LOCAL_WORLD_SIZE, fake_ranks.WORLD_SIZE, "cuda", sharder)
        kernel = "dense" if case.sharding == "data_parallel" else "fused"
        out[name] = replace(sharding, sharding_type=case.sharding, compute_kernel=kernel)
    return out


def _grid(p: Tensor, local_size: int, world_size: int, *_: Any) -> ParameterSharding:
    """A block of columns per host; TorchRec's helper makes one block of fewer than 128 columns."""
    hosts = world_size // local_size
    rows, columns = -(-p.shape[0] // local_size), p.shape[1] // hosts
    shards = [
        ShardMetadata(
            [i * rows, host * columns],
            [min(rows, p.shape[0] - i * rows), columns],
            f"rank:{host * local_size + i}/cuda:{i}",
        )
        for host in range(hosts)
        for i in range(local_size)
    ]
    return ParameterSharding("grid_shard", "fused", list(range(world_size)), EnumerableShardingSpec(shards))


def sharded(case: DeviceCase, module: nn.Module, device: torch.device) -> nn.Module:
    fused_params = {"optimizer": EmbOptimType[case.optimizer], "learning_rate": 0.1, "eps": 1e-8}
    sharder: Any = (
        CompositionalEmbeddingBagCollectionSharder(fused_params)
        if case.pooled
        else CompositionalEmbeddingCollectionSharder(fused_params, use_index_dedup=case.index_dedup)
    )
    env = ShardingEnv.from_process_group(dist.GroupMember.WORLD)
    return sharder.shard(module, plan(case, module, sharder), env, device=device)


def forward(module: nn.Module, features: KeyedJaggedTensor) -> Tensor:
    """From input dist to output dist, if there are such; the sum of all embeddings."""
    if hasattr(module, "input_dist"):
        context = module.create_context()
        local = module.input_dist(context, features).wait().wait()
        out = module.compute_and_output_dist(context, local).wait()
    else:
        out = module(features)
    values = [out.values()] if isinstance(out, KeyedTensor) else [_values(v) for v in out.values()]
    return torch.cat([v.reshape(-1) for v in values]).sum()


def _values(jagged: JaggedTensor) -> Tensor:
    return jagged.values()


def run(cuda: FakeCuda, case: DeviceCase) -> dict[str, dict[str, dict[str, int]]]:
    """Runs two steps, and returns the costs of the second by library, kind and place."""
    device = torch.device("cuda", case.device)
    tables, unsharded = configs(case), case.sharding == UNSHARDED
    logical = None if unsharded else collection(case, tables, torch.device("meta"))
    cuda.devices.with_events.clear()
    kept_on_device.cache_clear()  # of what the cases before have brought to the device
    with cuda.tensors():
        try:
            module = collection(case, tables, device) if logical is None else sharded(case, logical, device)
            optimizer = torch.optim.Adagrad(module.parameters()) if unsharded else None
            for _ in range(2):
                features = batch(case, tables, device)
                cuda.counts.clear()
                loss = forward(module, features)
                assert loss.device == device, loss.device
                loss.backward()
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()
            costs = cuda.counts.by_library()
        finally:
            assert torch.cuda.current_device() == 0, "a guard did not change the current device back"
        torchrec_qr.raise_pending()
    assert cuda.devices.with_events <= {case.device}, f"events of devices {cuda.devices.with_events}"
    return costs


def run_all(library: ctypes.CDLL, chosen: list[str], part: int, parts: int) -> None:
    """Prints what came of every case of a part that is chosen, or of all of the part if none is."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    cuda = FakeCuda(library)
    fake_ranks.start()
    programs: dict[str, Callable[[], dict[str, Any]]] = {
        **{case.id: partial(costs_or_error, cuda, case) for case in cases()},
        **{name: partial(refused, cuda, call) for name, call in CALLS.items()},
        **{name: partial(seen, cuda, fault) for name, fault in FAULTS.items()},
    }
    for name in list(programs)[part::parts]:
        if not chosen or name in chosen:
            print(json.dumps({"case": name, **programs[name]()}), flush=True)


def costs_or_error(cuda: FakeCuda, case: DeviceCase) -> dict[str, Any]:
    try:
        return {"costs": run(cuda, case)}
    except BaseException:
        return {"error": traceback.format_exc()}


def seen(cuda: FakeCuda, call: Callable[[], object]) -> dict[str, str]:
    """Returns for what a call waited each time, as the recorder saw it, or the error that it ended with."""
    cuda.counts.clear()
    try:
        with cuda.tensors():
            call()
    except BaseException:
        return {"seen": traceback.format_exc()}
    return {
        "seen": "; ".join(
            f"{kind}, {place.removeprefix('autograd ')}"
            for kind in WAITS
            for _, place in cuda.counts.of[kind].elements()
        )
    }


def refused(cuda: FakeCuda, call: Callable[[], None]) -> dict[str, str | None]:
    """Returns the message of the ValueError that a call raises, or how else it ended."""
    try:
        with cuda.tensors():
            call()
    except ValueError as error:
        return {"error": str(error)}
    except BaseException:
        return {"error": traceback.format_exc()}
    return {"error": None}
