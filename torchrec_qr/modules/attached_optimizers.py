"""In-backward optimizers of collections that are not sharded, which must not be lost in silence.

``apply_optimizer_in_backward`` attaches an optimizer to a parameter. A sharder takes it over. A collection that no
sharder knows stays as it is: each rank holds all rows, and `DistributedDataParallel` reduces dense gradients. A
parameter that leaves the meta device makes room for another one, which has no optimizer at all.
"""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_ALLOWED = (
    "allowed: sharders=torchrec_qr.distributed.get_default_sharders() of DistributedModelParallel, or sharder= of "
    "TorchRec's shard() and plan helpers, whose defaults do not know this collection"
)


def optimizer_names(p: nn.Parameter) -> str:
    """Returns the classes of the optimizers that are attached to a parameter, or an empty string."""
    return ", ".join(cls.__name__ for cls in getattr(p, "_optimizer_classes", ()))


def refuse_lost_optimizer(table: str, weight: nn.Parameter, on_meta: nn.Parameter | None) -> None:
    """Refuses a parameter that has lost its optimizer.

    Args:
        table (str): the table or partition, for the error.
        weight (nn.Parameter): its parameter.
        on_meta (nn.Parameter | None): the parameter with which it was built on the meta device.

    Raises:
        RuntimeError: the former parameter has an optimizer, and this one has none.
    """
    if on_meta is not None and (lost := optimizer_names(on_meta)) and not optimizer_names(weight):
        raise RuntimeError(
            f"table {table!r}: {lost}, which was attached to its parameter on the meta device, is lost on "
            f"{weight.device}, because the collection is not sharded; {_ALLOWED}; or attach it there"
        )


def refuse_replicas(
    parameters: Iterator[tuple[str, nn.Parameter, nn.Parameter | None]], replicated: DistributedDataParallel | None
) -> None:
    """Refuses to train tables with an optimizer that several ranks hold whole, and those that have lost it.

    Args:
        parameters (Iterator[tuple[str, nn.Parameter, nn.Parameter | None]]): arguments of `refuse_lost_optimizer`.
        replicated (DistributedDataParallel | None): the wrapper of the model, if there is one. A collection without one
            is that of a process alone, such as beside a sharded one to compare with.

    Raises:
        RuntimeError: a parameter has an optimizer, and is replicated on several ranks; or it has lost its optimizer.
    """
    world_size = 1 if replicated is None else replicated.process_group.size()
    for table, weight, on_meta in parameters:
        refuse_lost_optimizer(table, weight, on_meta)
        if world_size > 1 and (attached := optimizer_names(weight)):
            raise RuntimeError(
                f"table {table!r}: {attached} is attached to its parameter, and the collection is not sharded: each of "
                f"{world_size} ranks would hold all rows and step them by dense gradients; {_ALLOWED}"
            )
