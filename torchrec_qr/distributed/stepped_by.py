"""The optimizer of each parameter: in a sharded model, a parameter may belong to none, or to two."""

from collections.abc import Sequence

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.optim import Optimizer
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper

from torchrec_qr.distributed.fused_optimizer import RowOptimizer
from torchrec_qr.distributed.fused_params import RULES


def optimizer_of_each_parameter(model: nn.Module, dense_optimizers: Sequence[Optimizer]) -> dict[str, str]:
    """Returns, per name in ``model.named_parameters()``, the optimizer that steps the parameter.

    Of a parameter p that requires a gradient, with F(p) the optimizers attached to it, which step it in backward
    (``p._in_backward_optimizers``), and G(p) those of ``dense_optimizers`` with p in a parameter group,

        |F(p)| + |G(p)| = 1

    must hold. The value is ``"fused <name>"`` or ``"<name>"``, the name being the optimizer's class, or its rule for
    embedding tables where that is known: ``"fused Adagrad"``, ``"Adam"``. Parameters that require no gradient, or of
    which this rank stores nothing, are left out, except a plain table,
    which TorchRec's kernels step whatever its flag. TorchRec's own data-parallel tables are not stepped by a fused
    optimizer, though one may be configured: this finds them. A shared parameter counts once, under its first name.

    Args:
        model: any module, usually a ``DistributedModelParallel``.
        dense_optimizers: of torch or of TorchRec, whose ``CombinedOptimizer`` and wrappers are looked into. Fused ones
            among them (``dmp.fused_optimizer``) are passed over, since their parameters are marked.

    Raises:
        ValueError: parameters that no optimizer steps, or more than one, by name.

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
    """Returns whether a parameter may move; the flag of one that TorchRec's kernels step changes nothing."""
    attached = getattr(p, "_in_backward_optimizers", ())
    return p.requires_grad or any(not isinstance(o, RowOptimizer) for o in attached)


def _leaves(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that a combination or wrapper of TorchRec's holds."""
    if isinstance(optimizer, CombinedOptimizer):
        return [leaf for _, child in optimizer.optimizers for leaf in _leaves(child)]
    if isinstance(optimizer, KeyedOptimizerWrapper | OptimizerWrapper):
        return _leaves(optimizer._optimizer)
    return [optimizer]


def _rules_by_storage(model: nn.Module) -> dict[int, str]:
    """Returns the rules of the model's tables by the storage of their shards here: TorchRec's marks have none."""
    rules = {}
    for module in model.modules():
        if not isinstance(module, FusedOptimizerModule):
            continue
        for leaf in _leaves(module.fused_optimizer):
            for value in leaf.params.values() if isinstance(leaf, KeyedOptimizer) else ():
                shards = [s.tensor for s in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
                rules.update({_storage(shard): _rule(leaf) for shard in shards})
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


# Plain tables have the names of our rules, so that a compositional and a plain table with one rule read the same.
_TABLE_RULES = {kind: rule.__name__ for kind, rule in RULES.items()}
