"""The weights that a run ends with, as plain tensors: ``weights/<n>.safetensors``, which any program may read."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launch.data.errors import DataError, readable
from launch.dcp_reader import CheckpointReader
from launch.run_checkpoints import errors_of_dcp

_MODEL = "model.model."  # of the state's model, and therein of the training task's
_FILE_BYTES = 2**30


def write_weights(state: Path, folder: Path, about: dict[str, str]) -> None:
    """Writes the model of a checkpoint into ``folder``, as whole tensors under every plan; one process calls it.

    Host memory of a file's tensors, 1 GiB or one table, is all that it takes.

    Args:
        state (Path): of the checkpoint, as DCP wrote it.
        folder (Path): appears when it is complete, in the place of what was there.
        about (dict[str, str]): strings that each file gets.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        UnsafeCheckpointError: it would run code.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for i, saved in enumerate(_files(CheckpointReader(state))):
        tensors: dict[str, Any] = {key: torch.empty(of.size, dtype=of.properties.dtype) for key, of in saved.items()}
        reader = CheckpointReader(state)
        with errors_of_dcp(f"cannot load {state}", reader):
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        named = {key.removeprefix(_MODEL): tensor for key, tensor in tensors.items()}
        save_file(named, part / f"{i:05d}.safetensors", {"format": "pt", **about})
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the strings ``about`` them that `write_weights` wrote.

    Raises:
        DataError: there are none, a file cannot be read, or the files are not of one run.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(str(folder), "no weights; allowed: the folder of a run that came to its end")
    tensors: dict[str, Tensor] = {}
    about: dict[str, str] | None = None
    for path in files:
        with readable(path, "safetensors", SafetensorError), safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about is not None and said != about:
            raise DataError(str(path), f"it is of {said}; allowed: {about}, as {files[0].name}")
        about = said
    return tensors, about or {}


def _files(reader: CheckpointReader) -> Iterator[dict[str, TensorStorageMetadata]]:
    """Yields the model's tensors, as many at once as fill a file."""
    file: dict[str, TensorStorageMetadata] = {}
    size = 0
    for key, saved in reader.read_metadata().state_dict_metadata.items():
        if key.startswith(_MODEL) and isinstance(saved, TensorStorageMetadata):
            num_bytes = saved.size.numel() * saved.properties.dtype.itemsize
            if file and size + num_bytes > _FILE_BYTES:
                yield file
                file, size = {}, 0
            file[key] = saved
            size += num_bytes
    if file:
        yield file
