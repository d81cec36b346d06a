"""Loading a checkpoint of `torch.distributed.checkpoint` (DCP) under another plan.

``torch.distributed.checkpoint.save`` and ``load`` work across plans and world sizes. `load` adds three things:

- Tables of equal sizes may have other fingerprints. DCP overwrites the model's values, and ``load_state_dict`` raises
  afterwards. `load` compares fingerprints first, and writes nothing if one differs.
- A table may be full here and compositional in the checkpoint, or the reverse. DCP reports a missing key, and `load`
  reports the table and what to do.
- Rowwise optimizer state has one value per row and column shard, so that its size depends on the plan. DCP refuses
  another size. `ColumnSplitLoadPlanner` converts the state.
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
from torch.distributed.tensor import DTensor

from torchrec_qr.distributed.global_tensor import local_pieces
from torchrec_qr.fingerprint import check_fingerprint, check_form

Columns = tuple[int, int]


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Loads what ``torch.distributed.checkpoint.load`` does, under any plan and world size: see the module.

    Args:
        state_dict (dict[str, Any]): modules and optimizers, or their state dicts. The caller then calls
            ``load_state_dict``.
        checkpoint_id (str | os.PathLike[str] | None): the folder or URL.
        storage_reader (StorageReader | None): DCP's.
        process_group (dist.ProcessGroup | None): DCP's.
        no_dist (bool): whether this process loads alone.

    Raises:
        ValueError: a table here and in the checkpoint has another fingerprint, or is compositional in one of them
            alone. The message has the table and what differs, and nothing has been loaded.
        CheckpointException: DCP finds another difference.

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
    # Take each state dict once, because DCP would load into others than those with the fingerprints.
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
    """DCP's ``DefaultLoadPlanner`` that also converts rowwise optimizer state between column splits.

    TorchRec has one value h_C for each row and each shard of columns C, and saves the shards end to end. Under rowwise
    Adagrad h_C is the sum of mean_{c ∈ C} g_c² over steps, and under partial rowwise Adam and LAMB a decayed sum. The
    state of shards A becomes that of shards B by

        h_B = Σ_A |A ∩ B| / |B| · h_A

    This is exact if B consists of whole shards A. If a plan splits a shard A, its parts get copies of h_A. Each rank
    reads the whole saved state of a table that needs conversion into host memory. It is a D-th of the parameters or
    less.

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
        columns = _columns_of_dtensors({key: self.state_dict[key] for key in weights.values()})
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
            target = columns[weight] if weight in columns else _columns_of(self.state_dict[weight])
            if source != target:
                buffer = torch.empty(saved.size, dtype=saved.properties.dtype, device="cpu")
                self._conversions[key] = _Conversion(value, buffer, source, target)
                self.state_dict[key] = buffer

    def create_local_plan(self) -> LoadPlan:
        # Do not call DCP's method, because on a rank without shards of a table it assumes a checkpoint of before torch
        # 2.4, and drops the buffers above.
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
            self._conversions.pop(key).convert()


@dataclass
class _Conversion:
    """Converts state ``read`` of column shards ``source`` into shards ``target`` of ``destination``."""

    destination: Tensor | ShardedTensor | DTensor
    read: Tensor
    source: list[Columns]
    target: list[Columns]

    def convert(self) -> None:
        by_shard = self.read.view(len(self.source), -1)
        rows = by_shard.shape[1]
        for (offset,), piece in local_pieces(self.destination):
            if not piece.numel():
                continue
            start, stop = self.target[offset // rows]
            own = by_shard[:, offset % rows : offset % rows + piece.shape[0]]
            overlap = [max(0, min(b, stop) - max(a, start)) / (stop - start) for a, b in self.source]
            piece.detach().copy_(torch.tensor(overlap, dtype=own.dtype, device=own.device) @ own)


class _FingerprintPlanner(DefaultLoadPlanner):
    """Reads only the fingerprints of a checkpoint, into tensors of its own, and the keys."""

    def __init__(self) -> None:
        # Flatten nothing, because DCP then drops the keys of tables of which this rank has no shard, and ranks that
        # find different errors wait for one another.
        super().__init__(flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        own = {k: v for k, v in self.state_dict.items() if k.endswith(".fingerprint")}
        self._compositional = {k.removesuffix(".weight"): False for k in self.state_dict if k.endswith(".weight")}
        self._compositional |= {k.removesuffix(".fingerprint"): True for k in own}
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
        """Raises ValueError for the first table in another form, or with another fingerprint."""
        assert self.metadata is not None
        for path, compositional in self._compositional.items():
            check_form(self.metadata.state_dict_metadata, path, compositional)
        for key, own in self._own.items():
            check_fingerprint(key.split(".")[-2], self.state_dict[key], own)


def _columns(offsets_and_sizes: list[Columns]) -> list[Columns]:
    return sorted({(start, start + size) for start, size in offsets_and_sizes})


def _columns_of(weight: Any) -> list[Columns]:
    if not isinstance(weight, ShardedTensor):
        return [(0, weight.shape[1])]
    return _columns([(s.shard_offsets[1], s.shard_sizes[1]) for s in weight.metadata().shards_metadata])


def _columns_of_dtensors(weights: dict[str, Any]) -> dict[str, list[Columns]]:
    """Returns the columns of the shards of all ranks per key, because a ``DTensor`` has those of its rank alone."""
    own: dict[dist.ProcessGroup, dict[str, list[Columns]]] = {}
    for key, value in weights.items():
        if isinstance(value, DTensor) and value.dim() == 2:
            pieces = [(piece.offsets[1], piece.values.shape[1]) for piece in local_pieces(value)]
            own.setdefault(value.device_mesh.get_group(value.device_mesh.ndim - 1), {})[key] = pieces
    columns: dict[str, list[Columns]] = {}
    for group, of_rank in own.items():
        of_ranks: list[Any] = [None] * group.size()
        dist.all_gather_object(of_ranks, of_rank, group=group)
        columns |= {key: _columns([pair for of in of_ranks for pair in of[key]]) for key in of_rank}
    return columns
