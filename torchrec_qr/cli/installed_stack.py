"""Finds the installed torch, FBGEMM and TorchRec by their metadata: nothing is imported."""

import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")


@dataclass(frozen=True)
class Stack:
    """Installed versions, by metadata; None: not installed. ``fbgemm`` maps each FBGEMM distribution to its version.

    Example:
        >>> Stack(torch="2.13.0", torch_build="CPU", fbgemm={}, torchrec=None).fbgemm_name
        'fbgemm-gpu-cpu'
    """

    torch: str | None
    torch_build: str
    fbgemm: dict[str, str]
    torchrec: str | None

    @classmethod
    def installed(cls) -> "Stack":
        """Reads the metadata of the running interpreter's environment."""
        return cls(
            torch=version_of("torch"),
            torch_build=_torch_build(),
            fbgemm={name: version for name in FBGEMM if (version := version_of(name))},
            torchrec=version_of("torchrec"),
        )

    @property
    def fbgemm_name(self) -> str:
        """The FBGEMM distribution that belongs here: the one installed, unless it cannot be right."""
        if len(self.fbgemm) == 1 and not (self.torch_build == "CPU" and "fbgemm-gpu" in self.fbgemm):
            return next(iter(self.fbgemm))
        return "fbgemm-gpu" if self.torch_build != "CPU" and shutil.which("nvidia-smi") else "fbgemm-gpu-cpu"


def version_of(distribution: str) -> str | None:
    """Returns the version of an installed distribution; None: it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _torch_build() -> str:
    """Returns ``"CPU"``, ``"CUDA 13.0"`` or ``"ROCm 6.4"`` from torch's own version file; "" if there is none."""
    try:
        text = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text()
    except (metadata.PackageNotFoundError, OSError):
        return "CPU" if (version_of("torch") or "").endswith("+cpu") else ""
    for field, name in (("cuda", "CUDA"), ("hip", "ROCm")):
        if found := re.search(rf"^{field}\b.*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE):
            return f"{name} {found[1]}"
    return "CPU"
