"""Bad input to the operators: an error names what was given, in either direction, and no address outside is read."""

import pytest
import torch
from kernel_reference import one_table
from torch import Tensor

from torchrec_qr import ExplicitPartitions
from torchrec_qr.ops import lookup
from torchrec_qr.ops.arguments import Batch, DenseGradient, Outcome
from torchrec_qr.ops.backends import cpu
from torchrec_qr.ops.description import CodeLayout, Description, PartitionLayout, TableLayout
from torchrec_qr.ops.feature_lookup import look_up_features
from torchrec_qr.ops.lookup import stepped_lookup
from torchrec_qr.ops.operators import lookup_gradients_op, lookup_op
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.ops.update_rules import Adagrad, Sgd, Update

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")
SGD = Update(Sgd(), {}, 0.1)


def look_up(
    tables: Description, weights: list[Tensor], ids: Tensor, offsets: Tensor, id_weights: Tensor | None, pooled: bool
) -> Tensor:
    if pooled:
        return lookup.look_up(tables, weights, Batch(ids, offsets, id_weights, pooled))
    batch = Batch(ids, offsets, None, pooled, offsets.tolist())
    return torch.cat([out.view(-1) for out in look_up_features(tables, weights, batch)])


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
def test_ids_out_of_range(bad: int, dtype: torch.dtype, pooled: bool) -> None:
    tables, weights = one_table()
    with pytest.raises(IndexError, match=rf"table 't': id {bad} \(number 2\) is out of range \[0, 5\)"):
        look_up(tables, weights, ints(0, 4, bad, dtype=dtype), ints(0, 3), None, pooled)


@pytest.mark.parametrize("bad", [2**62, -(2**63), 2**63 - 1])
def test_ids_far_out_of_range(bad: int) -> None:
    tables, weights = one_table()
    with pytest.raises(IndexError, match=f"id {bad} "):
        look_up(tables, weights, ints(bad), ints(0, 1), None, True)


def test_any_id_of_a_closed_form_without_a_range() -> None:
    """Rows are those of Python's // and %, which PyTorch's are too."""
    layout = TableLayout("add", (PartitionLayout(4, 3, 5),), num_ids=-1)
    weight = torch.arange(20.0).view(5, 4)
    ids = ints(-1, -3, -4, 2**63 - 1, -(2**63), 14)
    out = look_up(Description([layout], ["t"]), [weight], ids, ints(0, 6), None, False)
    assert torch.equal(out.view(-1, 4), weight[ids // 3 % 5])


def test_rows_outside_of_what_is_stored() -> None:
    """A block of rows: codes and rows of other blocks are refused, though their ids are within the table."""
    layout = TableLayout("add", (PartitionLayout(4, 1, 10, first_row=5),), num_ids=10)
    tables, weight = Description([layout], ["t"]), torch.arange(20.0).view(5, 4)
    assert torch.equal(look_up(tables, [weight], ints(5, 9), ints(0, 2), None, False).view(-1, 4), weight[[0, 4]])
    with pytest.raises(IndexError, match="table 't': id number 1 has row -1 of partition 0"):
        look_up(tables, [weight], ints(5, 4), ints(0, 2), None, True)
    coded = TableLayout("add", (PartitionLayout(4, 1, 10, 5),), num_ids=10, code=CodeLayout(1, 1, 10, 5))
    assert torch.equal(look_up(Description([coded], ["t"]), [weight], ints(3), ints(0, 1), None, False), weight[3])
    for bad in (5, 2**62, 2**63 - 1, -1):
        with pytest.raises(IndexError, match="out of range"):
            look_up(Description([coded], ["t"]), [weight], ints(bad), ints(0, 1), None, True)


def test_class_maps_point_outside_of_no_weight() -> None:
    partitions = ExplicitPartitions([[0, 1, 2]]).bind(3)
    layout = TableLayout("add", partition_layouts(partitions, {0: 4}), num_ids=3)
    tables = Description([layout], ["t"], [torch.tensor([[0, 1, 7]], dtype=torch.int32)])
    with pytest.raises(IndexError, match="has row 7 of partition 0"):
        look_up(tables, [torch.zeros(3, 4)], ints(2), ints(0, 1), None, True)
    short = Description([layout], ["t"], [torch.zeros(1, 2, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"class map of shape \(1, 2\); allowed: \(K, 3\)"):
        look_up(short, [torch.zeros(3, 4)], ints(0), ints(0, 1), None, True)
    with pytest.raises(ValueError, match="0 class maps"):
        look_up(Description([layout], ["t"]), [torch.zeros(3, 4)], ints(0), ints(0, 1), None, True)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (ints(0, 2), r"offsets\[1\] = 2; allowed: offsets from 0 to the number of ids, 3"),
        (ints(0, 4), r"offsets\[1\] = 4"),
        (ints(1, 3), r"offsets\[0\] = 1"),
        (ints(0, 2, 1, 3), r"offsets\[2\] = 1 is less than the offset before it"),
        (ints(-1, 3), r"offsets\[0\] = -1 is less"),
        (ints(0, 2**40, 3), r"offsets\[2\] = 3 is less"),
        (ints(), "shapes"),
        (ints(0, 3).view(1, 2), "shapes"),
    ],
)
def test_offsets_that_do_not_cover_the_ids(offsets: Tensor, message: str) -> None:
    tables, weights = one_table()
    with pytest.raises(ValueError, match=message):
        look_up(tables, weights, ints(0, 1, 2), offsets, None, True)
    # The backward checks its own offsets, which no forward has seen here.
    out = torch.zeros(max(offsets.numel() - 1, 0), 4)
    with pytest.raises(ValueError, match=message):
        lookup_gradients_op(out, weights, [], ints(0, 1, 2), offsets, None, tables.text, True, [True], False)


@pytest.mark.parametrize(
    ("weight", "rows", "gradients", "message"),
    [
        (torch.zeros(3, 1025), ints(0), torch.zeros(1, 1025), r"\(3, 1025\), .*; allowed: rows of up to 1024"),
        (torch.zeros(4, 3).T, ints(0), torch.zeros(1, 4), r"\(3, 4\), strides \(1, 3\); allowed: .* contiguous"),
        (torch.zeros(3, 4), ints(0), torch.zeros(1, 5), r"gradients \(1, 5\); allowed: .* with \(n, 4\)"),
        (torch.zeros(3, 4), ints(0, dtype=torch.int32), torch.zeros(1, 4), r"rows torch.int32 \(1,\)"),
    ],
)
def test_steps_that_do_not_fit(weight: Tensor, rows: Tensor, gradients: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.update_rows(weight, rows, gradients, SGD)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_steps_of_rows_outside(bad: int) -> None:
    weight = torch.zeros(3, 4)
    with pytest.raises(IndexError, match=rf"row {bad} is out of range \[0, 3\)"):
        cpu.update_rows(weight, ints(0, bad), torch.ones(2, 4), SGD)
    assert not weight.any()


def test_a_backward_of_what_no_forward_has_seen() -> None:
    tables, (weight,) = one_table()
    before = weight.clone()

    def step(out_gradient: Tensor, ids: Tensor) -> None:
        cpu.backward(tables, [weight], Batch(ids, ints(0, 3), None, True), out_gradient, [SGD], False)

    with pytest.raises(IndexError, match="id 5"):
        step(torch.ones(1, 4), ints(0, 5, 2))
    for wrong in (torch.ones(1, 3), torch.ones(2, 4), torch.ones(4)):
        with pytest.raises(ValueError, match=r"a gradient of shape .*; allowed: \(1, 4\)"):
            step(wrong, ints(0, 1, 2))
    assert torch.equal(weight, before)
    step(torch.ones(1, 4), ints(0, 1, 1))
    assert torch.equal(weight[:, 0], before[:, 0] - torch.tensor([0.1, 0.2, 0.0, 0.0, 0.0]))


def test_sizes_that_do_not_fit() -> None:
    tables, (weight,) = one_table()
    ids, offsets = ints(0, 1), ints(0, 2)
    for weights, message in (
        ([weight, weight], "2 weights; allowed: one per partition, 1"),
        ([weight[:, :3]], r"shape \(5, 3\)"),
        ([weight.view(10, 2)], r"shape \(10, 2\)"),
        ([weight.T.contiguous().T], "strides"),
    ):
        with pytest.raises(ValueError, match=message):
            look_up(tables, weights, ids, offsets, None, True)
    with pytest.raises(ValueError, match="3 weights for 2 ids"):
        look_up(tables, [weight], ids, offsets, torch.ones(3), True)
    with pytest.raises(TypeError, match=r"torch\.float32, torch\.int64; allowed: torch\.int32"):
        look_up(tables, [weight], ids.float(), offsets, None, True)
    two = one_table(num_features=2)[0]
    with pytest.raises(ValueError, match="4 offsets for 2 features"):
        look_up(two, [weight], ids, ints(0, 1, 1, 2), None, True)
    step = Update(Adagrad(), {"momentum1": torch.zeros(4, 4)}, 0.1)
    out = stepped_lookup(tables, [weight.requires_grad_()], Batch(ids, offsets, None, True), lambda: [step])
    with pytest.raises(ValueError, match=r"state of shape \(4, 4\).*; allowed: contiguous, \(5, 4\)"):
        out.sum().backward()


def test_nothing_to_look_up() -> None:
    tables, (weight,) = one_table()
    empty, weight = ints(), weight.requires_grad_()
    assert look_up(tables, [weight], empty, ints(0), None, True).shape == (0, 4)
    assert look_up(tables, [weight], empty, ints(0, 0), None, False).shape == (0,)
    bags = look_up(tables, [weight], empty, ints(0, 0, 0), torch.ones(0), True)
    assert torch.equal(bags, torch.zeros(2, 4))
    (gradient,) = torch.autograd.grad(bags.sum(), [weight])
    assert torch.equal(gradient, torch.zeros(5, 4))
    none_stored, none = one_table(rows=1)[0], torch.zeros(0, 4, requires_grad=True)
    assert look_up(none_stored, [none], empty, ints(0, 0), None, True).shape == (1, 4)
    with pytest.raises(IndexError, match="has row 0 of partition 0"):
        look_up(none_stored, [none], ints(0), ints(0, 1), None, True)


def test_tensors_that_are_not_contiguous() -> None:
    """Columns of a wider weight, every second id, an expanded gradient: each is read as what it is."""
    tables, _ = one_table()
    wide = torch.arange(60.0).view(5, 12)
    weight = wide[:, 4:8].requires_grad_()
    ids, weights = torch.arange(10)[::2] % 5, torch.rand(5, 2)[:, 0].requires_grad_()
    out = look_up(tables, [weight], ids, ints(0, 9, 3, 9, 5)[::2], weights, True)
    rows = weight[ids] * weights.unsqueeze(1)
    expected = torch.stack([rows[:3].sum(0), rows[3:].sum(0)])
    torch.testing.assert_close(out, expected)
    upstream = torch.tensor([[1.0], [2.0]]).expand(2, 4)
    actual = torch.autograd.grad(out, [weight, weights], upstream)
    for a, e in zip(actual, torch.autograd.grad(expected, [weight, weights], upstream), strict=True):
        torch.testing.assert_close(a, e)


def overlapping() -> dict[str, Tensor]:
    """Weights (5, 4) whose rows share memory; the last one is a view in the middle of a larger storage."""
    return {
        "one row": torch.arange(1.0, 5.0).expand(5, 4),
        "rows one column apart": torch.arange(8.0).as_strided((5, 4), (1, 1)),
        "rows of a view": torch.arange(40.0)[20:].as_strided((5, 4), (2, 1), 22),
    }


@pytest.mark.parametrize("kind", list(overlapping()))
def test_rows_that_overlap_are_read_as_what_they_are(kind: str) -> None:
    tables, _ = one_table()
    weight = overlapping()[kind].detach().requires_grad_()
    ids, offsets = ints(0, 4, 4, 1), ints(0, 3, 4)
    for pooled in (True, False):
        out = look_up(tables, [weight], ids, offsets if pooled else ints(0, 4), None, pooled)
        rows = weight[ids]
        expected = torch.stack([rows[:3].sum(0), rows[3]]) if pooled else rows.reshape(-1)
        assert torch.equal(out, expected)
        actual, wanted = (torch.autograd.grad(y.square().sum(), [weight])[0] for y in (out, expected))
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("kind", list(overlapping()))
def test_rows_that_overlap_are_refused_by_operators_and_steps(kind: str) -> None:
    tables, _ = one_table()
    weight, ids, offsets = overlapping()[kind], ints(0, 4), ints(0, 2)
    common = (tables.class_maps, ids, offsets, None, tables.text, True)
    batch = Batch(ids, offsets, None, True)
    message = "whose rows overlap; allowed: rows that are 4 or more apart"
    with pytest.raises(ValueError, match=message):
        lookup_op([weight], *common)
    with pytest.raises(ValueError, match=message):
        lookup_gradients_op(torch.ones(1, 4), [weight], *common, [True], False)
    with pytest.raises(ValueError, match=message):
        cpu.backward(tables, [weight], batch, torch.ones(1, 4), [SGD], False)
    with pytest.raises(ValueError, match=message):
        stepped_lookup(tables, [weight.detach().requires_grad_()], batch, lambda: [SGD])
    with pytest.raises(ValueError, match=message):
        cpu.update_rows(weight, ints(1), torch.ones(1, 4), SGD)


def test_a_class_map_whose_rows_overlap_is_refused() -> None:
    partitions = ExplicitPartitions([[0, 1, 2], [0, 1, 0]]).bind(3)
    layout = TableLayout("mult", partition_layouts(partitions, {0: 4, 1: 4}), num_ids=3)
    tables = Description([layout], ["t"], [partitions.class_map[:1].expand(2, 3)])
    with pytest.raises(ValueError, match=r"a class map of shape \(2, 3\), strides \(0, 1\), whose rows overlap"):
        look_up(tables, [torch.ones(3, 4), torch.ones(2, 4)], ints(0), ints(0, 1), None, True)


META = torch.device("meta")


def mapped_table() -> tuple[TableLayout, list[Tensor], list[Tensor]]:
    partitions = ExplicitPartitions([[0, 1, 2], [0, 1, 0]]).bind(3)
    layout = TableLayout("mult", partition_layouts(partitions, {0: 4, 1: 4}), num_ids=3)
    return layout, [torch.ones(3, 4), torch.ones(2, 4)], [partitions.class_map]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("ids", "ids on meta; allowed: cpu, where partition 0 of table 't' lies"),
        ("offsets", "offsets on meta"),
        ("id weights", "weights of ids on meta"),
        ("partition", "a partition of table 't' on meta"),
        ("class map", "a class map of table 't' on meta"),
        ("gradient", r"a gradient of shape \(1, 4\) on meta; allowed: \(1, 4\) on cpu"),
        ("state", r"torch.float32 on meta; allowed: contiguous, \(3, 4\), torch.float32 on cpu"),
        ("touched", r"torch.uint8 on meta; allowed: contiguous, \(3,\), torch.uint8 on cpu"),
    ],
)
def test_a_tensor_on_another_device_is_named(where: str, message: str) -> None:
    """Kernels are given addresses, which mean nothing, or other memory, on another device."""
    layout, weights, class_maps = mapped_table()
    batch = Batch(ints(0, 2), ints(0, 2), torch.ones(2), True)
    gradient, states, touched = torch.ones(1, 4), [torch.zeros(3, 4), torch.zeros(2, 4)], [torch.zeros(3).byte()] * 2
    touched[1] = touched[1][:2].clone()
    match where:
        case "ids":
            batch = batch._replace(ids=batch.ids.to(META))
        case "offsets":
            batch = batch._replace(offsets=batch.offsets.to(META))
        case "id weights":
            batch = batch._replace(weights=torch.ones(2, device=META))
        case "partition":
            weights[1] = weights[1].to(META)
        case "class map":
            class_maps = [class_maps[0].to(META)]
        case "gradient":
            gradient = gradient.to(META)
        case "state":
            states[0] = states[0].to(META)
        case "touched":
            touched[0] = touched[0].to(META)
    outcomes: list[Outcome] = [Update(Adagrad(), {"momentum1": state}, 0.1) for state in states]
    if where == "touched":
        outcomes = list(map(DenseGradient, touched))
    tables, before = Description([layout], ["t"], class_maps), [w.clone() for w in weights]
    with pytest.raises(ValueError, match=message):
        cpu.backward(tables, weights, batch, gradient, outcomes, False)
    assert all(w.is_meta or torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    if where in ("ids", "offsets", "id weights", "partition", "class map"):
        with pytest.raises(ValueError, match=message):
            cpu.forward(tables, weights, batch)


@pytest.mark.parametrize("where", ["rows", "gradients"])
def test_rows_to_step_lie_where_the_weight_lies(where: str) -> None:
    rows, gradients = ints(1), torch.ones(1, 4)
    rows = rows.to(META) if where == "rows" else rows
    gradients = gradients.to(META) if where == "gradients" else gradients
    with pytest.raises(ValueError, match="allowed: cpu, as the weight"):
        cpu.update_rows(torch.ones(3, 4), rows, gradients, SGD)
