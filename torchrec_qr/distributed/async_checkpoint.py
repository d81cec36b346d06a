"""Checkpoints of `torch.distributed.checkpoint` (DCP) that a thread writes while training goes on.

``torch.distributed.checkpoint.async_save`` does not work with TorchRec's state dicts:

- Its stager refuses a ``ShardedTensor`` (``torch function 'data_ptr' … not supported``), also of TorchRec's own tables.
- Its thread sends messages over the default process group, where they mix with those of training.

`async_save` copies the values itself, and requires a process group of its own.
"""

import copy
import os
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint import StorageWriter
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.remote_device import _remote_device
from torch.distributed.tensor import DTensor
from torchrec.distributed.shards_wrapper import LocalShardsWrapper

from torchrec_qr.distributed.global_tensor import local_pieces


def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> "Future[Any]":
    """Copies all values into the host's memory, and returns while a thread writes them.

    Training may step the values in place afterwards. Wait for the result before the next call, and before the
    checkpoint counts as written. `torchrec_qr.distributed.checkpoint.load` loads it under any plan and world size.

    Args:
        state_dict (dict[str, Any]): modules and optimizers, or their state dicts.
        checkpoint_id (str | os.PathLike[str] | None): a folder, or a URL such as ``s3://bucket/step_8``, which fsspec
            writes.
        storage_writer (StorageWriter | None): DCP's.
        process_group (dist.ProcessGroup | None): a gloo group of all ranks that nothing else uses. Make it once, by
            ``dist.new_group(backend="gloo")``.
        no_dist (bool): whether this process saves alone.

    Returns:
        Future[Any]: the future of DCP's metadata, which raises any failure on every rank.

    Raises:
        ValueError: the group is missing, the default one, or one without gloo.
        TypeError: a value is a ``DTensor`` of another kind than TorchRec's.

    Example:
        >>> import tempfile, torch
        >>> from torchrec_qr.distributed.async_checkpoint import async_save
        >>> from torchrec_qr.distributed.checkpoint import load
        >>> values = {"w": torch.ones(2)}
        >>> folder = tempfile.TemporaryDirectory()
        >>> saved = async_save({"model": values}, checkpoint_id=folder.name, no_dist=True)
        >>> _ = values["w"].zero_()  # training goes on
        >>> _ = saved.result()
        >>> load({"model": values}, checkpoint_id=folder.name, no_dist=True)
        >>> values["w"]
        tensor([1., 1.])
    """
    if not no_dist:
        _check_group(process_group)
    saved: Future[Any] = dcp.async_save(  # type: ignore[assignment]
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_writer=storage_writer,
        process_group=process_group,
        async_stager=_HostCopies(),
        no_dist=no_dist,
    )
    return saved


def _check_group(group: dist.ProcessGroup | None) -> None:
    allowed = "allowed: a gloo group of all ranks that nothing else uses, as dist.new_group(backend='gloo')"
    if group is None or group is dist.GroupMember.WORLD:
        raise ValueError(f"process_group: {group and 'the default group'}, in which training goes on; {allowed}")
    if torch.device("cpu") not in group._device_types:
        raise ValueError(f"process_group: one of {dist.get_backend(group)}; {allowed}")


class _HostCopies(AsyncStager):
    """Copies all tensors into new host memory, also those of the host, because training steps rows in place."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        copied: dict[str, Any] = _copied(state_dict, "")
        return copied

    def synchronize_staging(self) -> None:
        """Does nothing. DCP calls this, and `stage` has made the copies."""

    def close(self) -> None:
        """Does nothing. DCP calls this, and there is nothing to release."""


def _copied(value: Any, path: str) -> Any:
    match value:
        case dict():
            return {key: _copied(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        case list() | tuple():
            return type(value)(_copied(item, f"{path}[{i}]") for i, item in enumerate(value))
        case ShardedTensor():
            return _copied_shards(value)
        case DTensor():
            return _copied_dtensor(value, path)
        case Tensor():
            return value.detach().to("cpu", copy=True)
        case _:
            return copy.deepcopy(value)


def _copied_shards(value: ShardedTensor) -> ShardedTensor:
    metadata = copy.deepcopy(value.metadata())
    of_offsets = {}
    for shard in metadata.shards_metadata:
        assert isinstance(shard.placement, _remote_device)
        shard.placement = _remote_device(f"rank:{shard.placement.rank()}/cpu")
        of_offsets[tuple(shard.shard_offsets)] = shard
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local_shards=[
            Shard(s.tensor.detach().to("cpu", copy=True), of_offsets[tuple(s.metadata.shard_offsets)])
            for s in value.local_shards()
        ],
        sharded_tensor_metadata=metadata,
        process_group=value._process_group,
    )


def _copied_dtensor(value: DTensor, path: str) -> DTensor:
    try:
        pieces = local_pieces(value)
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from None
    copies = [piece.values.detach().to("cpu", copy=True) for piece in pieces]
    wrapper = LocalShardsWrapper(copies, [piece.offsets for piece in pieces])
    # Do not call `DTensor.from_local`, because it moves the copies to the device of the mesh.
    return DTensor(wrapper, value._spec, requires_grad=False)
