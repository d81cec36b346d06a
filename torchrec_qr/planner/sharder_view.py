"""A sharder in the form that TorchRec's estimators take: up to 1.6 the sharder itself, since then its data."""

from inspect import signature
from typing import Any

from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.planner.utils import build_sharder_data, extract_comm_data_type_size
from torchrec.distributed.types import ModuleSharder

_TAKE_SHARDERS = "sharder" in signature(extract_comm_data_type_size).parameters


def sharder_view(sharder: ModuleSharder[Any]) -> Any:
    """Returns a sharder in the form that the installed TorchRec's estimators take."""
    return sharder if _TAKE_SHARDERS else build_sharder_data(sharder)


def comm_sizes(option: ShardingOption, view: Any) -> tuple[float, float, float, float]:
    """Returns the bytes of a value in the all-to-all forward and backward, the reduce-scatter and the all-gather.

    Args:
        option (ShardingOption): an option of a table.
        view (Any): the table's sharder from `sharder_view`.
    """
    name = "sharder" if _TAKE_SHARDERS else "sharder_data"
    sizes: tuple[float, float, float, float] = extract_comm_data_type_size(**{"sharding_option": option, name: view})
    return sizes
