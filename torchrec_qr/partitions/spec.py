"""The base class of specs, which describe partitions without the number of ids."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torchrec_qr.partitions.bound import BoundPartitions


class PartitionSpec(ABC):
    """The partitions of a table, without the number S of its ids, which the table's config has.

    Specs are frozen dataclasses, compared by their fields. Each has exactly one size. `bind` checks all values, because
    most limits depend on S. A config binds its spec when it is built, and its errors have the table's name.

    Attributes:
        kind (str): the name of the method, which is ``kind`` in YAML.

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
            TypeError: a value has another type than its field.
            ValueError: a value is out of range, or two of S ids would share all rows.
        """

    def _check_sized_once(self, sizings: Sequence[str]) -> None:
        given = [name for name in sizings if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            raise ValueError(
                f"{type(self).__name__}: exactly one of {', '.join(sizings)} must be given, got "
                f"{' and '.join(given) or 'none'}"
            )
