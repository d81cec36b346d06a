"""TorchRec's ``ModelDeltaTracker``, which takes ids for rows."""

from collections.abc import Iterable


def refuse_tracker(compositional: Iterable[str]) -> None:
    """Raises NotImplementedError if there are compositional tables, which TorchRec's ``ModelDeltaTracker`` mistakes.

    Args:
        compositional (Iterable[str]): their names.
    """
    if tables := list(compositional):
        raise NotImplementedError(
            f"tables {tables}: TorchRec's delta tracker is not supported by compositional tables, because it would "
            "report ids as rows of a partition; allowed: plain tables in a collection of their own, with this "
            "collection's name in fqns_to_skip"
        )
