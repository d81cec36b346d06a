"""The attribute by which torch and TorchRec ask for the quantised twin of a float collection."""

import warnings
from typing import Any, cast

from torch import nn


class Qconfig:
    """The attribute ``qconfig`` of a float collection, which torch's quantisation sets, and deletes at its end.

    A collection that is still there at the end stays as it is. The attribute then warns, because torch does not.
    """

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        if "qconfig" not in vars(module):
            raise AttributeError("qconfig")
        return vars(module)["qconfig"]

    def __set__(self, module: nn.Module, qconfig: Any) -> None:
        vars(module)["qconfig"] = qconfig

    def __delete__(self, module: nn.Module) -> None:
        vars(module).pop("qconfig", None)
        tables = [config.name for config in cast(Any, module).embedding_configs()]
        warnings.warn(
            f"{type(module).__name__} of tables {tables}: it stays as floats, because this quantisation has no entry "
            "for it; torchrec_qr.inference.quantize_embeddings(model, dtype) quantises it",
            stacklevel=2,
        )
