"""Quotient-remainder and generalized-partition embedding collections for TorchRec (arXiv:1909.02107).

Names are imported when first used, so that ``torchrec-qr doctor`` can run, and explain, where torch cannot.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchrec_qr.compress import compress_
    from torchrec_qr.configs import CompositionalEmbeddingBagConfig, CompositionalEmbeddingConfig
    from torchrec_qr.late_errors import raise_pending
    from torchrec_qr.modules.embedding_bag_collection import CompositionalEmbeddingBagCollection
    from torchrec_qr.modules.embedding_collection import CompositionalEmbeddingCollection
    from torchrec_qr.partitions import (
        ChineseRemainder,
        ExplicitPartitions,
        HashPartition,
        MixedRadix,
        QuotientRemainder,
    )

__version__ = "0.1.0"

__all__ = [
    "ChineseRemainder",
    "CompositionalEmbeddingBagCollection",
    "CompositionalEmbeddingBagConfig",
    "CompositionalEmbeddingCollection",
    "CompositionalEmbeddingConfig",
    "ExplicitPartitions",
    "HashPartition",
    "MixedRadix",
    "QuotientRemainder",
    "compress_",
    "raise_pending",
]

_MODULES = {
    "CompositionalEmbeddingBagCollection": "modules.embedding_bag_collection",
    "CompositionalEmbeddingBagConfig": "configs",
    "CompositionalEmbeddingCollection": "modules.embedding_collection",
    "CompositionalEmbeddingConfig": "configs",
    "compress_": "compress",
    "raise_pending": "late_errors",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'partitions')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
