"""The range check of ids."""

import pytest
import torch
from batches import batch
from torchrec import KeyedJaggedTensor

from torchrec_qr import raise_pending
from torchrec_qr.ids import IdSpace, arranged, bounded_ids


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


WEIGHTED = {"f_a": [[1, 2], [3]], "f_b": [[], [4]]}


def test_features_come_in_the_order_of_their_id_spaces() -> None:
    kjt = batch(WEIGHTED, torch.tensor([0.5, 1.0, 2.0, 3.0]))
    spaces = [space(table="b"), space(table="a"), space(table="b")]
    out = arranged(kjt, spaces, weighted=True, pooled=True)
    assert out.keys() == ["f_b", "f_a", "f_b"]
    assert (out.values().tolist(), out.lengths().tolist()) == ([4, 1, 2, 3, 4], [0, 1, 2, 1, 0, 1])
    assert (out.weights().tolist(), out.length_per_key()) == ([3.0, 0.5, 1.0, 2.0, 3.0], [1, 3, 1])
    assert arranged(kjt, [space(table="a")], weighted=False, pooled=True).weights_or_none() is None


def test_a_batch_that_is_in_order_is_not_copied() -> None:
    kjt = batch(WEIGHTED)
    assert arranged(kjt, [space(table="a"), space(table="b")], weighted=False, pooled=True) is kjt


def test_the_gradient_of_weights_goes_through_another_order() -> None:
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0], requires_grad=True)
    out = arranged(batch(WEIGHTED, weights), [space(table="b"), space(table="a")], weighted=True, pooled=True)
    out.weights().backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert weights.grad is not None
    assert weights.grad.tolist() == [2.0, 3.0, 4.0, 1.0]


@pytest.mark.parametrize("pooled", [True, False])
def test_features_of_fewer_bags_get_empty_ones_if_they_are_pooled(pooled: bool) -> None:
    kjt = KeyedJaggedTensor(
        keys=["f_a", "f_b"],
        values=torch.tensor([1, 2, 3]),
        lengths=torch.tensor([2, 0, 0, 1]),
        stride_per_key_per_rank=[[1], [3]],
        inverse_indices=(["f_a", "f_b"], torch.tensor([[0, 0, 0], [0, 1, 2]])),
    )
    out = arranged(kjt, [space(table="b"), space(table="a")], weighted=False, pooled=pooled)
    assert out.values().tolist() == [3, 1, 2]
    assert out.lengths().tolist() == ([0, 0, 1, 2, 0, 0] if pooled else [0, 0, 1, 2])
    assert out.stride_per_key() == ([3, 3] if pooled else [3, 1])


def test_a_batch_without_samples() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    kjt = KeyedJaggedTensor(["f_a", "f_b"], empty, lengths=empty)
    out = arranged(kjt, [space(table="b"), space(table="a")], weighted=False, pooled=True)
    assert (out.values().tolist(), out.lengths().tolist(), out.offsets().tolist()) == ([], [], [0])


def test_nothing_is_pending_on_the_cpu() -> None:
    raise_pending()
    with pytest.raises(IndexError, match="id 10"):
        bounded_ids(torch.tensor([10]), space())
    raise_pending()
    raise_pending(wait=False)
