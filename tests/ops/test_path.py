"""The ways of a GPU that make no host wait, on the CPU: MLPs by blocks of ids, sums of rows, steps of some rows."""

from collections.abc import Callable

import pytest
import torch
from kernel_reference import RULES, rule_of, update_of
from near import assert_near
from oracle import OracleTable
from torch import Tensor

from torchrec_qr.ops import path
from torchrec_qr.ops.read_rows import RowReads, _summed_without_wait

# (N, classes, D, H): none, one of many classes, several blocks of a class, more classes than ids.
SIZES = [(0, 3, 4, None), (1, 9, 4, 3), (90, 3, 4, 5), (150, 7, 20, None), (30, 500, 6, 8), (64, 1, 16, None)]


def drawn(n: int, num_classes: int, dim: int, hidden: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, MLPs, classes and a gradient of the output; some classes are frequent."""
    columns = dim * dim + dim if hidden is None else 2 * hidden * dim + hidden + dim
    torch.manual_seed(n)
    classes = torch.minimum(torch.randint(num_classes, (n,)), torch.randint(num_classes, (n,)))
    return torch.randn(n, dim), torch.randn(num_classes, columns), classes, torch.randn(n, dim)


@pytest.mark.parametrize("way", [path._by_class, path._by_blocks])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_each_input_passes_the_mlp_of_its_class(
    way: Callable[..., Tensor], sizes: tuple[int, int, int, int | None], activation: str
) -> None:
    x, mlps, classes, gradient = drawn(*sizes)
    leaves = [x.requires_grad_(), mlps.requires_grad_()]
    out = way(x, mlps, classes, sizes[3], activation)
    found = torch.autograd.grad(out, leaves, gradient)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    table = OracleTable(lambda _: (), [], "path", path_hidden=sizes[3], path_activation=activation)
    rows = [table.mlp(exact[1][c], exact[0][i]) for i, c in enumerate(classes.tolist())]
    expected = torch.stack(rows) if rows else exact[0] + exact[1].sum() * 0
    assert out.dtype == torch.float32
    assert_near(out.detach(), expected.detach(), 1e-6)
    of_exact = torch.autograd.grad(expected, exact, gradient.double())
    for name, actual, of in zip(("inputs", "MLPs"), found, of_exact, strict=True):
        assert_near(actual, of, 2e-6, f"gradient of the {name}")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_blocks_read_the_classes_that_occur(sizes: tuple[int, int, int, int | None]) -> None:
    """An MLP that is read is stepped, even by a gradient of zero."""
    x, mlps, classes, gradient = drawn(*sizes)
    by_class, by_blocks = RowReads(mlps), RowReads(mlps)
    path._by_class(x, by_class, classes, sizes[3], "relu")
    out = path._by_blocks(x, by_blocks, classes, sizes[3], "relu")
    assert set(by_blocks.rows[0].tolist()) == set(by_class.rows[0].tolist()) == set(classes.tolist())
    # One MLP a block of max(16, D) ids, and one more a class at most.
    assert len(by_blocks.rows[0]) <= len(classes) // max(16, sizes[2]) + min(len(classes), len(mlps))
    (of_blocks,) = torch.autograd.grad(out, by_blocks.leaves, gradient)
    assert of_blocks.shape == by_blocks.leaves[0].shape


@pytest.mark.parametrize(("n", "num_rows"), [(0, 5), (1, 5), (40, 5), (40, 300)])
def test_sums_without_a_wait_are_those_of_the_cpu(n: int, num_rows: int) -> None:
    torch.manual_seed(n)
    reads = RowReads(torch.zeros(num_rows, 3))
    reads.rows, reads.gradients = [torch.randint(num_rows, (n,))], [torch.randn(n, 3)]
    rows, sums = reads.summed()
    most = min(n, num_rows)
    found_rows, found_sums = _summed_without_wait(reads.rows[0], reads.gradients[0], most)
    assert found_rows.tolist() == rows.tolist() + [-1] * (most - len(rows))
    assert_near(found_sums[: len(rows)], sums, 1e-6)
    assert not found_sums[len(rows) :].any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [[], [-1], [-1, -1, -1], [2], [0, 3, -1, -1], [-1, 4, -1, 0], [1, 0, 4]], ids=str)
def test_a_row_of_minus_one_is_none(rule: str, rows: list[int]) -> None:
    torch.manual_seed(0)
    weight, gradient, given = torch.randn(5, 3), torch.randn(len(rows), 3), torch.tensor(rows, dtype=torch.int64)
    some, all_given = weight.clone(), weight.clone()
    of_some, of_given = (update_of(rule_of(rule), weight, t=3, fill=0.5) for _ in range(2))
    of_some.step_some(some, given, gradient)
    of_given.step(all_given, given[given >= 0], gradient[given >= 0])
    assert torch.equal(some, all_given)
    for name, state in of_given.state.items():
        assert torch.equal(of_some.state[name], state), name
    assert torch.equal(some, weight) == (max(rows, default=-1) < 0)
