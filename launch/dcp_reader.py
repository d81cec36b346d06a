"""Reads checkpoints of DCP without running code of theirs: their pickles may name what DCP's own writer names alone."""

import io
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # Python 3.13 has them in the second module.
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
}
# Override private methods, because DCP has no public way to read its metadata otherwise. A release without one of them
# must fail at import, because it would pass by the class below.
for _hook in ("read_metadata", "read_data", "_get_metadata_path"):
    if not hasattr(FileSystemReader, _hook):
        raise ImportError(f"torch.distributed.checkpoint.FileSystemReader has no {_hook}, on which {__name__} relies")


class UnsafeCheckpointError(RuntimeError):
    """A file of a checkpoint would run code, or reach out of its folder; names the file and what would run."""


class CheckpointReader(FileSystemReader):
    """DCP's ``FileSystemReader`` for folders that somebody else may have written.

    DCP reads ``.metadata`` by ``pickle.load``, and all that is no tensor by ``torch.load(weights_only=False)``: either
    runs code that the file names. Here metadata may name the classes of DCP's own metadata alone. Items that are no
    tensors are read by ``torch.load(weights_only=True)`` and written anew before DCP sees them.

    Attributes:
        refusal (UnsafeCheckpointError | None): the error by which metadata were refused; None: they were not.

    Raises:
        UnsafeCheckpointError: by `read_metadata` and `read_data`; ``torch.distributed.checkpoint.load`` passes it on
            within a ``CheckpointException``, but for that of metadata before torch 2.13.

    Example:
        >>> import tempfile
        >>> import torch.distributed.checkpoint as dcp
        >>> folder, weights = tempfile.TemporaryDirectory(), torch.zeros(2)
        >>> _ = dcp.save({"w": torch.ones(2)}, checkpoint_id=folder.name, no_dist=True)
        >>> dcp.load({"w": weights}, storage_reader=CheckpointReader(folder.name), no_dist=True)
        >>> weights.tolist()
        [1.0, 1.0]
    """

    refusal: UnsafeCheckpointError | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            return self._metadata(kwargs.get("rank"))
        except UnsafeCheckpointError as error:
            self.refusal = error
            raise

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return super().read_data(plan, _SafeBytes(planner, self))  # type: ignore[arg-type]

    def _metadata(self, rank: int | None) -> Metadata:
        path = Path(self._get_metadata_path(rank))
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file, path).load()
        if not isinstance(metadata, Metadata):
            raise UnsafeCheckpointError(f"{path}: holds a {type(metadata).__name__}; allowed: metadata of a checkpoint")
        for info in (metadata.storage_data or {}).values():
            name = info.relative_path
            if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
                raise UnsafeCheckpointError(f"{path}: names the file {name!r}; allowed: files of the same folder")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._memory_format
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ALLOWED and not is_dtype:
            raise self._refusal(f"{module}.{name}")
        return super().find_class(module, name)

    def _memory_format(self, *arguments: object) -> _MEM_FORMAT_ENCODING:
        """Returns a member of DCP's enumeration, which Python 3.11.2 pickles as ``getattr(class, name)``."""
        for name, member in _MEM_FORMAT_ENCODING.__members__.items():
            if arguments == (_MEM_FORMAT_ENCODING, name):
                return member
        raise self._refusal("builtins.getattr")

    def _refusal(self, named: str) -> UnsafeCheckpointError:
        return UnsafeCheckpointError(
            f"{self._path}: would run code, as it names {named}; allowed: classes of DCP's metadata"
        )


class _SafeBytes:
    """Passes to a load planner the bytes that were read as data, and written anew."""

    def __init__(self, planner: LoadPlanner, reader: FileSystemReader) -> None:
        self._planner, self._reader = planner, reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            item = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # Leave out PyTorch's advice to read the file without this check, because others may have written it.
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            problem = f"would run code, as it names {named[1]}" if named else "is no data that PyTorch reads"
            file = Path(self._reader.path) / self._reader.storage_data[read_item.storage_index].relative_path
            raise UnsafeCheckpointError(
                f"{file}: item {read_item.storage_index.fqn} {problem}; allowed: tensors, numbers, strings and "
                "collections of these"
            ) from error
        written = io.BytesIO()
        torch.save(item, written)
        written.seek(0)
        self._planner.load_bytes(read_item, written)
