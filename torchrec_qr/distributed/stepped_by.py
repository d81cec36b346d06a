"""The optimizer of each parameter of a sharded model, which may have none or two by mistake."""

from collections.abc import Sequence

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper

from torchrec_qr.distributed.fused_optimizer import PartitionOptimizer, RowOptimizer
from torchrec_qr.distributed.fused_params import RULES
from torchrec_qr.distributed.global_tensor import local_pieces


def optimizer_of_each_parameter(model: nn.Module, dense_optimizers: Sequence[Optimizer]) -> dict[str, str]:
    """Returns, per name in ``model.named_parameters()``, the optimizer that steps the parameter.

    Let F(p) be the fused optimizers of a parameter p (``p._in_backward_optimizers``), and G(p) the
    ``dense_optimizers`` with p in a parameter group. Each parameter p that requires a gradient must have

        |F(p)| + |G(p)| = 1

    The value is ``"fused <name>"`` or ``"<name>"``, such as ``"fused Adagrad"`` or ``"Adam"``. The name is that of the
    optimizer's class, or of its rule for embedding tables. The result has no parameters without a gradient or without
    rows on this rank. Plain tables are an exception, because TorchRec's kernels ignore ``requires_grad``. The function
    finds TorchRec's own data-parallel tables, which no fused optimizer steps. A shared parameter counts once, under its
    first name.

    Args:
        model (nn.Module): any module, usually a ``DistributedModelParallel``.
        dense_optimizers (Sequence[Optimizer]): optimizers of torch or of TorchRec. The function looks into TorchRec's
            ``CombinedOptimizer`` and wrappers, and ignores fused ones (``dmp.fused_optimizer``).

    Raises:
        ValueError: no optimizer steps a parameter, or more than one do. The message has its name.

    Example:
        >>> import torch
        >>> from torchrec_qr.distributed import optimizer_of_each_parameter
        >>> model = torch.nn.ModuleDict({"over": torch.nn.Linear(2, 1, bias=False), "top": torch.nn.Linear(1, 1)})
        >>> over = torch.optim.SGD(model["over"].parameters(), lr=0.1)
        >>> top = torch.optim.Adam(model["top"].parameters())
        >>> optimizer_of_each_parameter(model, [over, top])
        {'over.weight': 'SGD', 'top.weight': 'Adam', 'top.bias': 'Adam'}
        >>> optimizer_of_each_parameter(model, [over])
        Traceback (most recent call last):
        ...
        ValueError: no optimizer steps 'top.weight', 'top.bias'; allowed: exactly one per parameter
    """
    dense: dict[int, list[str]] = {}
    for optimizer in dense_optimizers:
        for leaf in _leaves(optimizer):
            if not isinstance(leaf, FusedOptimizer):
                for p in (p for group in leaf.param_groups for p in group["params"]):
                    dense.setdefault(id(p), []).append(type(leaf).__name__)
    rules = _rules_by_storage(model)
    steps = {
        name: [
            *(f"fused {rules.get(_storage(p), type(o).__name__)}" for o in getattr(p, "_in_backward_optimizers", ())),
            *dense.get(id(p), ()),
        ]
        for name, p in model.named_parameters()
        if p.numel() and _is_stepped(p)
    }
    wrong = []
    if unstepped := [name for name, by in steps.items() if not by]:
        wrong.append(f"no optimizer steps {', '.join(map(repr, unstepped))}")
    wrong += [f"{name!r} is stepped by {' and '.join(by)}" for name, by in steps.items() if len(by) > 1]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; allowed: exactly one per parameter")
    return {name: by for name, (by,) in steps.items()}


def _is_stepped(p: nn.Parameter) -> bool:
    """Returns whether an optimizer may step a parameter. TorchRec's kernels ignore ``requires_grad``."""
    attached = [leaf for o in getattr(p, "_in_backward_optimizers", ()) for leaf in _leaves(o)]
    return p.requires_grad or any(not isinstance(o, PartitionOptimizer) for o in attached)


def _leaves(optimizer: Optimizer) -> list[Optimizer]:
    """Returns the optimizers in a combination or wrapper of TorchRec's."""
    if isinstance(optimizer, CombinedOptimizer):
        return [leaf for _, child in optimizer.optimizers for leaf in _leaves(child)]
    if isinstance(optimizer, KeyedOptimizerWrapper | OptimizerWrapper):
        return _leaves(optimizer._optimizer)
    return [optimizer]


def _rules_by_storage(model: nn.Module) -> dict[int, str]:
    """Returns the rules of the model's tables by the storage of their shards, because TorchRec's attribute has none."""
    rules = {}
    for module in model.modules():
        if not isinstance(module, FusedOptimizerModule):
            continue
        for leaf in _leaves(module.fused_optimizer):
            for value in leaf.params.values() if isinstance(leaf, KeyedOptimizer) else ():
                rules.update({_storage(piece.values): _rule(leaf) for piece in local_pieces(value)})
    return rules


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _rule(optimizer: Optimizer) -> str:
    if isinstance(optimizer, RowOptimizer):
        return optimizer.rule_name
    tables = getattr(optimizer, "_emb_module", None)
    if isinstance(tables, SplitTableBatchedEmbeddingBagsCodegen):
        return _TABLE_RULES.get(tables.optimizer, str(tables.optimizer))
    return type(optimizer).__name__


# Use the names of our rules for plain tables too, so that one rule has one name.
_TABLE_RULES = {kind: rule.__name__ for kind, rule in RULES.items()}
