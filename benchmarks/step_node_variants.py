"""Variants of the step benchmark with a copy of each table per node, or per rank."""

from dataclasses import replace
from typing import Any

import torch
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.sharding_plan import table_wise

from benchmarks.step_cells import Tables, Traffic
from benchmarks.step_sharded_variants import Ours
from torchrec_qr.distributed import per_node


class CopyPerNode(Ours):
    """`Ours` with a copy per node of each table, table-wise within it."""

    def _revise(self, of_tables: Any, collection: Any, sharder: Any) -> None:
        local_size = get_local_size()
        parameters = sharder.shardable_parameters(collection)
        for i, (name, parameter) in enumerate(parameters.items()):
            generate = per_node(table_wise(rank=i % local_size))
            of_tables[name] = generate(parameter, local_size, local_size, self.device.type, sharder)


class CopyPerRank(Ours):
    """`Ours` with a copy per rank of each table: data-parallel."""

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(replace(tables, sharding="data_parallel"), m, traffic, device)
