"""Scores rows by an exported model, with PyTorch alone: ``python score.py FOLDER/model.pt2 FOLDER/rows.pt``.

The operators' library lies beside the model. It prints one score a row.
"""

import sys
from pathlib import Path

import torch

_CAPABILITIES = {"x86-64-v3": ("AVX2", "AVX512"), "x86-64-v4": ("AVX512",)}


def main(package: Path, rows: Path) -> None:
    torch.ops.load_library(package.with_name("serving_operators.so"))
    model = torch._inductor.aoti_load_package(str(package))
    needed, own = model.get_metadata()["torchrec_qr.cpu"], torch.backends.cpu.get_cpu_capability()
    if own not in _CAPABILITIES[needed]:
        sys.exit(f"{package} needs a CPU of the level {needed}; this one has {own}")
    scores = model(*torch.load(rows))
    print("\n".join(f"{score:.9g}" for score in scores.tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
