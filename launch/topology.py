"""The cluster that a job is planned for, by its config and by the memory of its cards."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import Topology

from launch.config import Job
from torchrec_qr.planner import Hardware, hardware_named

_GIB = 2**30
# Allow a little less, because a card of 80 GB shows its programs 79.6 GiB at most.
_LEAST_SHARE = 0.9


@dataclass(frozen=True)
class Card:
    """The GPU of a rank: its name, and the bytes of its memory."""

    name: str
    memory: int

    @classmethod
    def of(cls, device: torch.device) -> "Card":
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.name, properties.total_memory)


class CardError(ValueError):
    """The plan counts on memory that the card does not have."""


def planned_topology(job: Job, device: torch.device) -> Topology | None:
    """Returns that of the job's planner section if it names the device that this is; None: as the planner finds it.

    Raises:
        CardError: this rank's card has less memory than the named device; see `planned_memory_gib`.
    """
    name = job.planner.device
    if name is None or hardware_named(name).compute_device != device.type:
        name = "cpu" if device.type == "cpu" and job.planner.hbm_gib is not None else None
    if name is None:
        return None
    hardware, world_size = hardware_named(name), dist.get_world_size()
    gib = job.planner.hbm_gib
    if device.type == "cuda":
        gib = planned_memory_gib(hardware, gib, Card.of(device))
    return hardware.topology(world_size, get_local_size(world_size), gib)


def planned_memory_gib(hardware: Hardware, hbm_gib: float | None, card: Card) -> float:
    """Returns the memory of a rank that a plan may count on: that of the config, but no more than the card has.

    Args:
        hardware (Hardware): that ``planner.device`` names.
        hbm_gib (float | None): ``planner.hbm_gib``; None: that of the device.
        card (Card): of this rank.

    Raises:
        CardError: the card has much less than the config names; the message has both and what to write.

    Example:
        >>> from torchrec_qr.planner import hardware_named
        >>> planned_memory_gib(hardware_named("h100"), None, Card("NVIDIA H100 80GB HBM3", 85_520_809_984))
        79.6474609375
        >>> planned_memory_gib(hardware_named("h100"), 60.0, Card("NVIDIA H100 80GB HBM3", 85_520_809_984))
        60.0
        >>> planned_memory_gib(hardware_named("h100"), None, Card("NVIDIA L4", 23_034_000_000))
        Traceback (most recent call last):
        ...
        launch.topology.CardError: planner.device: 'h100' has 80 GiB, and the card of this rank, NVIDIA L4, has 21.5
        GiB. Allowed: the card that is there, or its memory, as --set planner.hbm_gib=21
    """
    has = card.memory / _GIB
    wanted, key = (hardware.memory_gib, "planner.device") if hbm_gib is None else (hbm_gib, "planner.hbm_gib")
    if has < _LEAST_SHARE * wanted:
        said = f"{hardware.name!r} has {wanted:g} GiB" if hbm_gib is None else f"{wanted:g} GiB"
        raise CardError(
            f"{key}: {said}, and the card of this rank, {card.name}, has {has:.1f} GiB. Allowed: the card that is "
            f"there, or its memory, as --set planner.hbm_gib={int(has)}"
        )
    return min(wanted, has)
