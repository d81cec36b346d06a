"""What a plan takes beside the work of its tables: for every sharding type that a collection is spread over."""

from collections.abc import Iterable, Sequence

from torchrec_qr.distributed.shards import DATA_PARALLEL, ROW_SPLIT
from torchrec_qr.planner.hardware import Hardware
from torchrec_qr.planner.tables import PlannedTable


class FixedCosts:
    """Milliseconds of a step on every rank, whatever lies where:

        Σ over modules of  Σ over its sharding types of (sharding_ms, where embeddings are exchanged;
                                                         replication_ms, where gradients are reduced)
                           + concat_factor · bytes of its pooled output / bandwidth, where it has several types

    TorchRec distributes, looks up and collects the tables of each sharding type by themselves, and then puts the
    columns of all side by side, forward, and takes their gradient apart, backward.

    Args:
        tables: of the model.
        hardware: constants; see `torchrec_qr.planner.hardware`.
        batch_size: of a rank.
        bandwidth: of the device's memory, bytes per ms.
    """

    def __init__(
        self, tables: Sequence[PlannedTable], hardware: Hardware, batch_size: int, bandwidth: float
    ) -> None:
        self._hardware = hardware
        self._modules = [table.path for table in tables]
        self._has_replicas = [
            table.config is not None and any(not partition.is_base for partition in table.partitions)
            for table in tables
        ]
        self._concat_ms = dict.fromkeys(self._modules, 0.0)
        for table in tables:
            if table.is_pooled:
                size = batch_size * table.num_features * table.columns * table.parameter.element_size()
                self._concat_ms[table.path] += size * hardware.concat_factor / bandwidth

    def ms(self, sharding_types: Iterable[str]) -> float:
        """The cost of a sharding type per table, in the order of the tables."""
        types_of: dict[str, set[str]] = {}
        reduced = set()
        for module, has_replicas, sharding_type in zip(
            self._modules, self._has_replicas, sharding_types, strict=True
        ):
            types_of.setdefault(module, set()).add(sharding_type)
            if sharding_type == DATA_PARALLEL or (has_replicas and sharding_type in ROW_SPLIT):
                reduced.add((module, sharding_type))
        exchanged = sum(len(types - {DATA_PARALLEL}) for types in types_of.values())
        concatenated = sum(self._concat_ms[module] for module, types in types_of.items() if len(types) > 1)
        hardware = self._hardware
        return exchanged * hardware.sharding_ms + len(reduced) * hardware.replication_ms + concatenated
