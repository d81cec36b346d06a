"""Uses an installed wheel as a user does, and prints as JSON what was found: ``wheel_user.py PROGRAM``."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torchrec import KeyedJaggedTensor

COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "clang++")


def counted_lookups() -> list[int]:
    """Returns a list of one number: how often the library of kernels has looked tables up from here on."""
    from torchrec_qr.ops import cpu_library

    library, calls = cpu_library.library(), [0]
    assert library is not None
    look_up = library.qr_forward

    def look_up_and_count(*arguments: Any) -> Any:
        calls[0] += 1
        return look_up(*arguments)

    library.qr_forward = look_up_and_count
    return calls


def serve() -> tuple[float, str]:
    """Returns how far served lookups are from the products of their rows, and the error of an id that is too large."""
    from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
    from torchrec_qr.inference import quantize_embeddings

    table = CompositionalEmbeddingBagConfig(
        name="t_user",
        feature_names=["user"],
        num_embeddings=1_000,
        embedding_dim=8,
        partitions=QuotientRemainder(num_collisions=10),
    )
    collection = CompositionalEmbeddingBagCollection(tables=[table])
    served = quantize_embeddings(collection, torch.float32)

    def looked_up(ids: list[int]) -> torch.Tensor:
        lengths = torch.ones(len(ids), dtype=torch.long)
        batch = KeyedJaggedTensor(keys=["user"], values=torch.tensor(ids), lengths=lengths)
        return served(batch).values()

    remainders, quotients = sorted(collection.parameters(), key=len, reverse=True)
    expected = torch.stack([remainders[x % 100] * quotients[x // 100] for x in (0, 99, 100, 999)])
    difference = float((looked_up([0, 99, 100, 999]) - expected.detach()).abs().max())
    try:
        looked_up([7, 1_000])
    except IndexError as error:
        return difference, str(error)
    return difference, ""


def main(program: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lookups = counted_lookups()
        exec(compile(program.read_text(), str(program), "exec"), {})
        difference, error = serve()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = {
        "compilers": [name for name in COMPILERS if shutil.which(name)],
        "package": str(Path(sys.modules["torchrec_qr"].__file__ or "").parent),
        "torch": torch.__version__,
        "warnings": [f"{w.filename}: {w.message}" for w in caught],
        "lookups": lookups[0],
        "served_difference": difference,
        "served_error": error,
        "openmp": [path for path in mapped if re.search(r"/lib(gomp|omp|iomp5)\b", path)],
        "libraries": sorted(path for path in mapped if "/torchrec_qr/" in path),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
