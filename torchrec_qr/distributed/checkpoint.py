"""Loading a checkpoint of `torch.distributed.checkpoint` (DCP) into collections that are sharded in another way.

``torch.distributed.checkpoint.save`` and ``load`` work as they are, across plans and world sizes, but for two things
that they leave out, and that `load` adds:

- Tables of equal sizes may differ in meaning. DCP writes into the tensors of the state dict it is given, which are the
  model's own; ``load_state_dict`` then raises for a fingerprint that differs, when the model's values are overwritten.
  `load` compares fingerprints first, and writes nothing if one differs.
- Rowwise optimizer state is kept per row and column shard, so that its size depends on the plan. DCP refuses another
  size by name; `ColumnSplitLoadPlanner` converts.
"""

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, StorageReader
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.stateful import Stateful

from torchrec_qr.fingerprint import check_fingerprint

Columns = tuple[int, int]


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Loads as ``torch.distributed.checkpoint.load`` does, under any plan and world size; see the module.

    Args:
        state_dict: of modules and optimizers, or what their ``state_dict()`` returned: then ``load_state_dict`` is
            left to the caller.
        checkpoint_id, storage_reader, process_group, no_dist: as DCP's.

    Raises:
        ValueError: a table of the checkpoint has the name of one here but another meaning, D or sizes: names the
            table and what differs. Nothing has been loaded then.
        CheckpointException: of DCP, for whatever else does not fit.

    Example:
        >>> import tempfile, torch
        >>> import torch.distributed.checkpoint as dcp
        >>> from torchrec_qr import (
        ...     CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder)
        >>> from torchrec_qr.distributed.checkpoint import load
        >>> def collection(grouping):
        ...     return CompositionalEmbeddingBagCollection(tables=[CompositionalEmbeddingBagConfig(name="t",
        ...         num_embeddings=100, embedding_dim=8, feature_names=["f"],
        ...         partitions=QuotientRemainder(num_collisions=10, grouping=grouping))])
        >>> folder = tempfile.TemporaryDirectory()
        >>> _ = dcp.save({"model": collection("strided")}, checkpoint_id=folder.name, no_dist=True)
        >>> load({"model": collection("adjacent")}, checkpoint_id=folder.name, no_dist=True)
        Traceback (most recent call last):
        ...
        ValueError: table 't': the checkpoint is of another table: grouping: saved strided, here adjacent
    """
    # Take each state dict once: DCP would take new ones, and return the one that holds the fingerprints to be checked.
    states = {k: v.state_dict() if isinstance(v, Stateful) else v for k, v in state_dict.items()}
    where: dict[str, Any] = {
        "checkpoint_id": checkpoint_id,
        "storage_reader": storage_reader,
        "process_group": process_group,
        "no_dist": no_dist,
    }
    fingerprints = _FingerprintPlanner()
    dcp.load(dict(states), planner=fingerprints, **where)
    fingerprints.check()
    dcp.load(states, planner=ColumnSplitLoadPlanner(), **where)
    for key, value in state_dict.items():
        if isinstance(value, Stateful):
            value.load_state_dict(states[key])
        else:
            state_dict[key] = states[key]


class ColumnSplitLoadPlanner(DefaultLoadPlanner):
    """DCP's ``DefaultLoadPlanner`` that also takes rowwise optimizer state across column splits.

    TorchRec keeps one h a row and column shard, with columns C of D, and saves the shards of all rows end to end. For
    rowwise Adagrad, where h_C accumulates mean_{c ∈ C} g_c², state of shards A becomes that of shards B as

        h_B = Σ_A |A ∩ B| / |B| · h_A

    which is exact where B is made of whole shards A, and copies h_A to the parts of a shard A that is split.
    Each rank reads the whole saved state of the tables that need it, a D-th of their parameters or less, into host
    memory, whatever the device of the state.

    Example:
        >>> from torchrec_qr.distributed.checkpoint import ColumnSplitLoadPlanner
        >>> planner = ColumnSplitLoadPlanner()  # torch.distributed.checkpoint.load(…, planner=planner)
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        weights = {path[-1]: key for key, path in self.mappings.items() if "state" not in path}
        self._conversions: dict[str, _Conversion] = {}
        for key, value in list(self.state_dict.items()):
            saved = metadata.state_dict_metadata.get(key)
            path = self.mappings.get(key, ())
            weight = weights.get(path[-2]) if len(path) > 1 else None
            if weight is None or not isinstance(saved, TensorStorageMetadata) or len(saved.size) != 1:
                continue
            saved_weight = metadata.state_dict_metadata.get(weight)
            if not isinstance(saved_weight, TensorStorageMetadata) or len(saved_weight.size) != 2:
                continue
            source = _columns([(c.offsets[1], c.sizes[1]) for c in saved_weight.chunks])
            target = _columns_of(self.state_dict[weight])
            if source != target:
                buffer = torch.empty(saved.size, dtype=saved.properties.dtype, device="cpu")
                self._conversions[key] = _Conversion(value, buffer, source, target)
                self.state_dict[key] = buffer

    def create_local_plan(self) -> LoadPlan:
        # DCP's own guesses at checkpoints of before torch 2.4, by keys that this rank lacks: it may well own no shard
        # of a table, and would lose the buffers above.
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata, not self.allow_partial_load)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        self._unread = Counter(item.dest_index.fqn for item in new_plan.items)
        return super().finish_plan(new_plan)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        key = read_item.dest_index.fqn
        self._unread[key] -= 1
        if key in self._conversions and not self._unread[key]:
            self._conversions.pop(key).run()


@dataclass
class _Conversion:
    """Turns rowwise state ``read``, of column shards ``source`` end to end, into ``target`` of ``destination``."""

    destination: Tensor | ShardedTensor
    read: Tensor
    source: list[Columns]
    target: list[Columns]

    def run(self) -> None:
        by_shard = self.read.view(len(self.source), -1)
        rows = by_shard.shape[1]
        pieces: list[tuple[int, Tensor]] = [(0, self.destination)]
        if isinstance(self.destination, ShardedTensor):
            pieces = [(s.metadata.shard_offsets[0], s.tensor) for s in self.destination.local_shards()]
        for offset, piece in pieces:
            if not piece.numel():
                continue
            start, stop = self.target[offset // rows]
            own = by_shard[:, offset % rows : offset % rows + piece.shape[0]]
            overlap = [max(0, min(b, stop) - max(a, start)) / (stop - start) for a, b in self.source]
            piece.detach().copy_(torch.tensor(overlap, dtype=own.dtype, device=own.device) @ own)


class _FingerprintPlanner(DefaultLoadPlanner):
    """Reads the fingerprints of a checkpoint alone, as they are, into tensors of its own."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        own = {k: v for k, v in self.state_dict.items() if k.endswith(".fingerprint")}
        saved = {k: metadata.state_dict_metadata.get(k) for k in own}
        self._own = {k: own[k] for k, v in saved.items() if isinstance(v, TensorStorageMetadata)}
        self.state_dict = {
            k: torch.empty(v.size, dtype=v.properties.dtype, device="cpu")
            for k, v in saved.items()
            if isinstance(v, TensorStorageMetadata)
        }

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def check(self) -> None:
        """Raises ValueError for the first table of another meaning."""
        for key, own in self._own.items():
            check_fingerprint(key.split(".")[-2], self.state_dict[key], own)


def _columns(offsets_and_sizes: list[Columns]) -> list[Columns]:
    return sorted({(start, start + size) for start, size in offsets_and_sizes})


def _columns_of(weight: Any) -> list[Columns]:
    if not isinstance(weight, ShardedTensor):
        return [(0, weight.shape[1])]
    return _columns([(s.shard_offsets[1], s.shard_sizes[1]) for s in weight.metadata().shards_metadata])
