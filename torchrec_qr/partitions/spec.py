"""The specs' base class: which rows an id selects, for a number of ids that only the table's config has."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torchrec_qr.partitions.bound import BoundPartitions


class PartitionSpec(ABC):
    """How a table's ids select rows, without the number S of ids, which the table's config has.

    The specs are frozen dataclasses, compared by their fields. A spec is sized in exactly one way. `bind` checks all
    values, because most limits depend on S. A config binds its spec when it is built, and names the table in errors.

    Attributes:
        kind (str): the name of the method, ``kind`` in YAML.

    Example:
        >>> from torchrec_qr import MixedRadix, QuotientRemainder
        >>> QuotientRemainder(compression=4.0).bind(1_000_000).sizes
        (200000, 5)
        >>> MixedRadix(balanced=True, num_partitions=3).bind(1_000_000).sizes
        (100, 100, 100)
    """

    kind: ClassVar[str]

    @abstractmethod
    def bind(self, num_embeddings: int) -> BoundPartitions:
        """Returns the partitions of S ids.

        Args:
            num_embeddings (int): S, at most 2^40.

        Raises:
            TypeError: a value is not of its field's type.
            ValueError: a value is out of range, or the partitions cannot tell S ids apart.
        """

    def _check_sized_once(self, sizings: Sequence[str]) -> None:
        given = [name for name in sizings if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            raise ValueError(
                f"{type(self).__name__}: exactly one of {', '.join(sizings)} must be given, got "
                f"{' and '.join(given) or 'none'}"
            )
