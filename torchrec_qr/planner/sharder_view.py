"""What TorchRec's estimators are told of a sharder: up to 1.6 it is the sharder itself, and since then its data."""

from inspect import signature
from typing import Any

from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.planner.utils import build_sharder_data, extract_comm_data_type_size
from torchrec.distributed.types import ModuleSharder

_TAKE_SHARDERS = "sharder" in signature(extract_comm_data_type_size).parameters


def sharder_view(sharder: ModuleSharder[Any]) -> Any:
    """Returns what the installed TorchRec's estimators take for a sharder, by the name of its module."""
    return sharder if _TAKE_SHARDERS else build_sharder_data(sharder)


def comm_sizes(option: ShardingOption, view: Any) -> tuple[float, float, float, float]:
    """Returns bytes of a value that travels: to all and back, scattered and gathered.

    Args:
        option: a choice for a table.
        view: of the table's sharder, by `sharder_view`.
    """
    name = "sharder" if _TAKE_SHARDERS else "sharder_data"
    sizes: tuple[float, float, float, float] = extract_comm_data_type_size(**{"sharding_option": option, name: view})
    return sizes
