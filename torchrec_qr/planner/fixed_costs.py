"""What a plan takes beside the work of its tables: for every sharding type that a collection is spread over."""

from collections.abc import Iterable, Sequence

from torchrec.distributed.planner.types import CollectiveType, Topology

from torchrec_qr.distributed.layout import DATA_PARALLEL, ROW_SPLIT
from torchrec_qr.planner.estimators import memory_bandwidth
from torchrec_qr.planner.hardware import Hardware
from torchrec_qr.planner.tables import PlannedTable


class FixedCosts:
    """Milliseconds of a step on every rank, whatever lies where:

        Σ over modules of  Σ over its sharding types of (sharding_ms, where embeddings are exchanged;
                                                         replication_ms, where gradients are reduced;
                                                         2 · message / link, where messages are above overlap_mib)
                           + concat_factor · bytes of its pooled output / memory bandwidth, where it has several types

    TorchRec distributes, looks up and collects the tables of each sharding type by themselves, and then puts the
    columns of all side by side, forward, and takes their gradient apart, backward. A rank's message is what it sends
    to all others, on average, in one all-to-all, forward or backward.

    Args:
        tables: of the model.
        hardware: constants; see `torchrec_qr.planner.hardware`.
        batch_size: of a rank.
        topology: bandwidths.
    """

    def __init__(self, tables: Sequence[PlannedTable], hardware: Hardware, batch_size: int, topology: Topology) -> None:
        self._hardware = hardware
        self._modules = [table.path for table in tables]
        self._has_replicas = [
            table.config is not None and any(not partition.is_base for partition in table.partitions)
            for table in tables
        ]
        world, local = topology.world_size, topology.local_world_size
        self._others = world - 1
        # TorchRec's bandwidth is of all that the ranks receive of a shard, of which an owner sends so much.
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
        """The cost of a sharding type per table, in the order of the tables."""
        # Of each sharding type of each module, bytes of a rank's message to another, and of these those exchanged.
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
