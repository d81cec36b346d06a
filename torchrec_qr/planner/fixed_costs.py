"""The time that each sharding type of a collection takes, whatever its tables cost."""

from collections.abc import Iterable, Sequence

from torchrec.distributed.planner.types import CollectiveType, Topology

from torchrec_qr.distributed.layout import DATA_PARALLEL, ROW_SPLIT
from torchrec_qr.planner.estimators import memory_bandwidth
from torchrec_qr.planner.hardware import Hardware
from torchrec_qr.planner.tables import PlannedTable


class FixedCosts:
    """The milliseconds of a step that depend on the sharding types of a module, and not on the ranks of its tables.

    They are a sum over modules of

        Σ over its sharding types of (sharding_ms, if ranks send embeddings;
                                      replication_ms, if ranks reduce gradients;
                                      2 · message / link, if a message is larger than overlap_mib)
        + concat_factor · bytes of its pooled output / memory bandwidth, if it has several types

    TorchRec runs the input dist, lookup and output dist of each sharding type separately. The forward then concatenates
    the columns of all types, and the backward splits their gradient. A message is what a rank sends to all others in an
    all-to-all, on average over ranks.

    Args:
        tables (Sequence[PlannedTable]): the tables of the model.
        hardware (Hardware): the constants in the formula.
        batch_size (int): the samples of a rank.
        topology (Topology): the bandwidths.
    """

    def __init__(self, tables: Sequence[PlannedTable], hardware: Hardware, batch_size: int, topology: Topology) -> None:
        self._hardware = hardware
        self._modules = [table.path for table in tables]
        self._has_replicas = [len(table.partitions) > 1 for table in tables]
        world, local = topology.world_size, topology.local_world_size
        self._others = world - 1
        # Multiply by W, because TorchRec's bandwidth counts what all ranks receive of a shard.
        self._message_ms = 2 * world / topology.comms_bandwidths.get_bw(local, world, CollectiveType.ALL_TO_ALL)
        self._messages = []
        self._concat_ms = dict.fromkeys(self._modules, 0.0)
        bandwidth = memory_bandwidth(topology)
        for table in tables:
            rows = batch_size * (table.num_features if table.is_pooled else sum(table.inputs_per_sample))
            size = rows * table.columns * table.parameter.element_size()
            self._messages.append(size / world)
            if table.is_pooled:
                self._concat_ms[table.path] += size * hardware.concat_factor / bandwidth

    def ms(self, sharding_types: Iterable[str]) -> float:
        """Returns the milliseconds for one sharding type per table, in the order of the tables."""
        # The bytes that a rank sends to one other, by module and sharding type.
        messages: dict[tuple[str, str], float] = {}
        reduced = set()
        for module, has_replicas, message, sharding_type in zip(
            self._modules, self._has_replicas, self._messages, sharding_types, strict=True
        ):
            key = module, sharding_type
            messages[key] = messages.get(key, 0.0) + message
            if sharding_type == DATA_PARALLEL or (has_replicas and sharding_type in ROW_SPLIT):
                reduced.add(key)
        hardware = self._hardware
        total = len(reduced) * hardware.replication_ms
        for (_, sharding_type), message in messages.items():
            if sharding_type == DATA_PARALLEL:
                continue
            total += hardware.sharding_ms
            if sharding_type not in ROW_SPLIT and message * self._others > hardware.overlap_mib * 2**20:
                total += message * self._message_ms
        modules = [module for module, _ in messages]
        return total + sum(ms for module, ms in self._concat_ms.items() if modules.count(module) > 1)
