"""The range check of ids."""

import pytest
import torch
from batches import batch
from torchrec import KeyedJaggedTensor

from torchrec_qr import raise_pending
from torchrec_qr.ids import IdSpace, bags_of, bounded_ids


def space(policy: str = "error", num_ids: int = 10, table: str = "t") -> IdSpace:
    return IdSpace(table, f"f_{table}", num_ids, policy)


def test_policies_by_value() -> None:
    ids = torch.tensor([-21, -1, 0, 9, 10, 2**62])
    assert bounded_ids(ids, space("clamp")).tolist() == [0, 0, 0, 9, 9, 9]
    assert bounded_ids(ids, space("wrap")).tolist() == [9, 9, 0, 9, 0, 2**62 % 10]
    assert bounded_ids(ids, space("unchecked")).tolist() == ids.tolist()
    assert bounded_ids(ids[2:4], space("error")).tolist() == [0, 9]
    with pytest.raises(IndexError, match=r"id -21 is outside \[0, 10\)"):
        bounded_ids(ids, space("error"))
    with pytest.raises(IndexError, match=rf"id {2**62} is outside \[0, 10\)"):
        bounded_ids(ids[2:], space("error"))


@pytest.mark.parametrize("policy", ["error", "clamp", "wrap", "unchecked"])
def test_int32_ids_become_int64_and_no_ids_are_no_error(policy: str) -> None:
    out = bounded_ids(torch.tensor([3], dtype=torch.int32), space(policy, num_ids=2**40))
    assert (out.dtype, out.tolist()) == (torch.int64, [3])
    assert bounded_ids(torch.empty(0, dtype=torch.int64), space(policy)).tolist() == []


def test_the_given_ids_stay_as_they_are() -> None:
    ids = torch.tensor([-1, 10])
    for policy in ("clamp", "wrap"):
        bounded_ids(ids, space(policy))
    assert ids.tolist() == [-1, 10]


def test_bags_are_read_per_id_space_in_its_order() -> None:
    kjt = batch({"f_a": [[1, 2], [3]], "f_b": [[], [4]]}, torch.tensor([0.5, 1.0, 2.0, 3.0]))
    b, a = bags_of(kjt, [space(table="b"), space(table="a")], weighted=True)
    assert (a.ids.tolist(), a.offsets.tolist(), a.lengths.tolist()) == ([1, 2, 3], [0, 2, 3], [2, 1])
    assert (b.ids.tolist(), b.offsets.tolist(), b.lengths.tolist()) == ([4], [0, 0, 1], [0, 1])
    assert a.weights is not None
    assert a.weights.tolist() == [0.5, 1.0, 2.0]
    assert bags_of(kjt, [space(table="a")], weighted=False)[0].weights is None


def test_a_batch_without_samples() -> None:
    kjt = KeyedJaggedTensor(["f_t"], torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int64))
    (bags,) = bags_of(kjt, [space()], weighted=False)
    assert (bags.ids.tolist(), bags.offsets.tolist(), bags.lengths.tolist()) == ([], [0], [])


def test_nothing_is_pending_on_the_cpu() -> None:
    raise_pending()
    with pytest.raises(IndexError, match="id 10"):
        bounded_ids(torch.tensor([10]), space())
    raise_pending()
    raise_pending(wait=False)
