"""From a trained collection to scores, full or quantised rows, packages that serve, and from checkpoints of others."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchrec_qr.inference.dlrm_checkpoint import load_dlrm_checkpoint
    from torchrec_qr.inference.full_rows import materialize, materialized_blocks
    from torchrec_qr.inference.item_scores import TopItems, score_all, top_items
    from torchrec_qr.inference.plain_collection import to_plain
    from torchrec_qr.inference.quantised_model import quantize_embeddings
    from torchrec_qr.inference.serving_package import write_package
    from torchrec_qr.ops.serving_library import operators_library

__all__ = [
    "TopItems",
    "load_dlrm_checkpoint",
    "materialize",
    "materialized_blocks",
    "operators_library",
    "quantize_embeddings",
    "score_all",
    "to_plain",
    "top_items",
    "write_package",
]

# Give no module the name of a function, because an import of the module replaces the function.
_MODULES = {
    "TopItems": "inference.item_scores",
    "load_dlrm_checkpoint": "inference.dlrm_checkpoint",
    "materialize": "inference.full_rows",
    "materialized_blocks": "inference.full_rows",
    "operators_library": "ops.serving_library",
    "quantize_embeddings": "inference.quantised_model",
    "score_all": "inference.item_scores",
    "to_plain": "inference.plain_collection",
    "top_items": "inference.item_scores",
    "write_package": "inference.serving_package",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"torchrec_qr.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
