"""Packages of AOTInductor that name the CPU they need and hold no path of the machine that compiled them."""

import zipfile
from pathlib import Path
from platform import machine
from tempfile import TemporaryDirectory

import torch
from torch._inductor import aoti_compile_and_package
from torch._inductor import config as inductor

from torchrec_qr.ops import served_operators  # noqa: F401  (registers the operators)

try:
    from torch._inductor.runtime.cache_dir_utils import cache_dir
except ImportError as error:
    raise ImportError(
        f"this version of torch has no {error.name}.cache_dir, by which torchrec_qr finds the paths that AOTInductor "
        "writes into a package"
    ) from error

CPU_KEY = "torchrec_qr.cpu"
# The bits of the widest registers of each level of the x86-64 architecture.
CPU_LEVELS = {"x86-64-v3": 256, "x86-64-v4": 512}


def write_package(program: torch.export.ExportedProgram, file: Path, cpu: str = "x86-64-v3") -> Path:
    """Compiles an exported program into a package of AOTInductor, which Python and C++ load.

    A process that runs the package loads `torchrec_qr.inference.operators_library` first, and needs PyTorch besides it
    alone. The package's metadata has the level of the CPU under ``torchrec_qr.cpu``.

    Args:
        program (torch.export.ExportedProgram): of ``torch.export.export``. Number of bags B and number of ids N are
            dynamic, and B is a dimension of an input: AOTInductor before PyTorch 2.14 computes B wrongly from 3·B + 1
            offsets.
        file (Path): ``<name>.pt2``, which appears when it is complete.
        cpu (str): the level of the CPU on which the package will run: ``"x86-64-v3"``, which has AVX2, or
            ``"x86-64-v4"``, which has AVX-512.

    Returns:
        Path: ``file``.

    Raises:
        NotImplementedError: this machine is no x86-64, or this version of PyTorch compiles for its own CPU alone.
        ValueError: a level of another name.

    Example:
        >>> write_package(None, Path("model.pt2"), cpu="x86-64-v2")
        Traceback (most recent call last):
            ...
        ValueError: cpu: 'x86-64-v2'; allowed: x86-64-v3, x86-64-v4
    """
    if cpu not in CPU_LEVELS:
        raise ValueError(f"cpu: {cpu!r}; allowed: {', '.join(CPU_LEVELS)}")
    if machine() != "x86_64":
        raise NotImplementedError(f"a package for {machine()}; allowed: x86_64")
    if not hasattr(inductor.cpp, "march"):
        raise NotImplementedError(
            f"torch {torch.__version__} compiles packages for the CPU of this machine alone; allowed: torch 2.13 or "
            "later, which also compiles programs that an earlier version has exported"
        )
    configs = {"cpp.march": cpu, "cpp.simdlen": CPU_LEVELS[cpu], "aot_inductor.metadata": {CPU_KEY: cpu}}
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        # The name of the file is a folder in the package.
        compiled = Path(folder, file.name)
        aoti_compile_and_package(program, package_path=str(compiled), inductor_configs=configs)
        part = file.with_name(f"{file.name}.part")
        _copy_without_paths(compiled, part, [folder])
    return part.replace(file)


def _copy_without_paths(package: Path, out: Path, folders: list[str]) -> None:
    """Copies a package without the text of its sources of C++, and without paths of this machine."""
    torch_folder = Path(torch.__file__).parent
    places = {cache_dir(), str(torch_folder), str(torch_folder.resolve()), str(Path(cache_dir()).resolve()), *folders}
    with zipfile.ZipFile(package) as compiled, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as copy:
        for entry in compiled.infolist():
            # No loader reads a source, but that of PyTorch 2.11 finds other files by the name of one.
            content = b"" if entry.filename.endswith(".cpp") else compiled.read(entry)
            # The longest first, because one may lie in another.
            for place in sorted(places, key=len, reverse=True):
                content = content.replace(place.encode(), _of_same_length(place))
            copy.writestr(zipfile.ZipInfo(entry.filename, entry.date_time), content)


def _of_same_length(place: str) -> bytes:
    # A library's strings keep their places.
    return b"." + b"/" * (len(place.encode()) - 1)
