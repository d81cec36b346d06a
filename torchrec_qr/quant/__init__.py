"""The quantised twins of the collections in ``torchrec_qr.modules``, as ``torchrec.quant`` has those of TorchRec."""

from torchrec_qr.quant import torchrec_entries  # noqa: F401  (TorchRec's sharding finds the collections)
from torchrec_qr.quant.quant_bag_collection import QuantCompositionalEmbeddingBagCollection
from torchrec_qr.quant.quant_collection import QuantCompositionalEmbeddingCollection

__all__ = ["QuantCompositionalEmbeddingBagCollection", "QuantCompositionalEmbeddingCollection"]
