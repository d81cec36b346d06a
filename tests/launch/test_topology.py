"""The memory that a plan counts on is no more than the card has. None of this needs a GPU."""

import pytest

from launch.topology import Card, CardError, planned_memory_gib
from torchrec_qr.planner import hardware_named

GIB = 2**30
H100 = Card("NVIDIA H100 80GB HBM3", 85_520_809_984)


@pytest.mark.parametrize(
    ("device", "hbm_gib", "card", "expected"),
    [
        ("h100", None, H100, 85_520_809_984 / GIB),  # a little less than the 80 GiB of its name
        ("h100", 80.0, H100, 85_520_809_984 / GIB),
        ("h100", 40.0, H100, 40.0),
        ("h100", None, Card("NVIDIA H200", 141 * GIB), 80.0),  # the config's memory, though the card has more
        ("h100", None, Card("NVIDIA H100 PCIe", 72 * GIB), 72.0),  # nine tenths
        ("h100", 20.0, Card("NVIDIA L4", 22 * GIB), 20.0),
    ],
)
def test_the_memory_of_a_rank(device: str, hbm_gib: float | None, card: Card, expected: float) -> None:
    assert planned_memory_gib(hardware_named(device), hbm_gib, card) == expected


@pytest.mark.parametrize(
    ("device", "hbm_gib", "card", "message"),
    [
        (
            "h100",
            None,
            Card("NVIDIA A100-SXM4-40GB", 42_400_000_000),
            "planner.device: 'h100' has 80 GiB, and the card of this rank, NVIDIA A100-SXM4-40GB, has 39.5 GiB. "
            "Allowed: the card that is there, or its memory, as --set planner.hbm_gib=39",
        ),
        (
            "h100",
            100.0,
            H100,
            "planner.hbm_gib: 100 GiB, and the card of this rank, NVIDIA H100 80GB HBM3, has 79.6 GiB. "
            "Allowed: the card that is there, or its memory, as --set planner.hbm_gib=79",
        ),
    ],
)
def test_a_smaller_card_is_refused(device: str, hbm_gib: float | None, card: Card, message: str) -> None:
    with pytest.raises(CardError) as caught:
        planned_memory_gib(hardware_named(device), hbm_gib, card)
    assert str(caught.value) == message
