"""The ``init_fn`` of compositional configs without one, which TorchRec's collections call to fill full rows."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NoFullTable:
    """Refuses to fill a full table of a compositional config. Our collections initialise partitions instead.

    Args:
        table (str): the name of the config's table.

    Raises:
        TypeError: it is called.

    Example:
        >>> NoFullTable("t_user")(None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        TypeError: table 't_user': a collection of TorchRec would store all its rows; allowed for a compositional ...
    """

    table: str

    def __call__(self, weight: Tensor) -> None:
        raise TypeError(
            f"table {self.table!r}: a collection of TorchRec would store all its rows; allowed for a compositional "
            "config: CompositionalEmbeddingBagCollection, CompositionalEmbeddingCollection"
        )
