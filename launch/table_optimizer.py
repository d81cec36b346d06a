"""The optimizer of TorchRec's own data-parallel tables, which its fused optimizers do not step."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.optim.keyed import KeyedOptimizerWrapper


class DataParallelTableOptimizer(KeyedOptimizerWrapper):
    """SGD, Adagrad or rowwise Adagrad, whose state has the keys and shapes of the fused optimizer's.

    So a checkpoint loads though the plan shards a table that was data-parallel, and the other way round. The fused
    state of table t is ``t.momentum1``: (S, D) for Adagrad, (S,) for rowwise Adagrad.

    Args:
        tables (Mapping[str, nn.Parameter]): parameters, by names that end in ``<table>.weight``.
        make (Callable[[Any], Optimizer]): the optimizer, whose state is ``sum``, if it has one.
    """

    def __init__(self, tables: Mapping[str, nn.Parameter], make: Callable[[Any], Optimizer]) -> None:
        super().__init__(tables, make)
        self.state = {p: self._fused_state(name.split(".")[-2], p) for name, p in tables.items()}

    def _fused_state(self, table: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self._optimizer.state.get(parameter, {})
        if "sum" not in state:
            return {}
        # Return a view, because a state that is loaded into it must reach the optimizer.
        rowwise = state["sum"].numel() == parameter.shape[0] < parameter.numel()
        return {f"{table}.momentum1": state["sum"].view(-1) if rowwise else state["sum"]}
