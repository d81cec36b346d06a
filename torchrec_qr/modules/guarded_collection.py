"""Both collections refuse what TorchRec would do in silence, or with an error that names nothing."""

import inspect
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.fused_embedding_modules import fuse_embedding_optimizer
from torchrec.quant.embedding_modules import _get_device, quantize_state_dict

from torchrec_qr.configs import is_compositional
from torchrec_qr.modules.attached_optimizers import refuse_replicas
from torchrec_qr.modules.table import stored_parameters

# The code of the function in ``fuse_embedding_optimizer`` that replaces TorchRec's own collections by fused ones.
_FUSING = [code for code in fuse_embedding_optimizer.__code__.co_consts if isinstance(code, CodeType)]
# The code by which ``from_float`` of TorchRec reads collections derived from ours, and those behind managed collisions.
_QUANTISING = [quantize_state_dict.__code__, _get_device.__code__]


class GuardedCollection(nn.Module):
    """A mixin that refuses functions of TorchRec which know its own classes alone, and to train replicas of ranks.

    TorchRec has no seam for that, so the two methods that these functions call look at their caller. Other callers get
    what ``nn.Module`` returns. `torchrec_qr.modules.attached_optimizers` has the rule of training.
    """

    # Whether the values came from a full table, which a sharded collection must not draw anew.
    has_fitted_values: bool = False
    # Whether a call in training was within DDP, for calls that were allowed.
    _checked: tuple[bool, ...] = ()

    def embedding_configs(self) -> Any:
        """Returns the configs of the tables."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            replicated = DistributedDataParallel._get_active_ddp_module()
            # Check once alone and once within DDP, which may wrap a model after its first call.
            if (replicated is not None) not in self._checked:
                refuse_replicas(stored_parameters(self), replicated)
                self._checked = (*self._checked, replicated is not None)
        return super().__call__(*args, **kwargs)

    def named_children(self) -> Any:
        """Returns what ``nn.Module`` does.

        Raises:
            NotImplementedError: the caller is TorchRec's ``fuse_embedding_optimizer``, which would leave this
                collection without an optimizer.
        """
        if _is_called_by(_FUSING):
            configs: list[BaseEmbeddingConfig] = self.embedding_configs()
            raise NotImplementedError(
                f"{type(self).__name__}, tables {[config.name for config in configs]}: fuse_embedding_optimizer is not "
                "supported, whose fused collections have no partitions; allowed: apply_optimizer_in_backward of "
                "TorchRec on the collection's parameters, or fused_params of a sharder"
            )
        return super().named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what ``nn.Module`` does.

        Raises:
            NotImplementedError: the caller is ``from_float`` of TorchRec's quantised managed collisions, which would
                make full tables without values, or that of its quantised collections, which take no class derived
                from ours; and a table is compositional.
        """
        if _is_called_by(_QUANTISING):
            tables = [config.name for config in self.embedding_configs() if is_compositional(config)]
            if tables:
                raise NotImplementedError(
                    f"{type(self).__name__}, tables {tables}: from_float of TorchRec's quantised classes is not "
                    "supported here by compositional tables; allowed: torchrec_qr.inference.quantize_embeddings"
                )
        return super().state_dict(*args, **kwargs)


def _is_called_by(codes: list[CodeType]) -> bool:
    """Returns whether the caller of a method, two frames up, runs one of ``codes``."""
    method = getattr(inspect.currentframe(), "f_back", None)
    return method is not None and method.f_back is not None and method.f_back.f_code in codes
