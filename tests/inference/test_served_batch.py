"""The lookup of a served model's batch: in Python, traced by `torch.fx`, and in TorchScript."""

from typing import Any

import pytest
import torch
import torchrec.fx
from batches import batch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from torchrec_qr.modules import served_batch
from torchrec_qr.modules.served_batch import served_pooled, served_sequences
from torchrec_qr.ops.description import PartitionLayout, TableLayout
from torchrec_qr.ops.served_operators import ServedTable, served_layout

S = 100
QR = TableLayout("mult", (PartitionLayout(8, 1, 25), PartitionLayout(8, 25, 4)), num_ids=S)
# Keys in another order than the tables' features, and one that is nobody's.
BATCH = {"x": [[500], []], "g": [[2], [3, 99]], "f": [[5, 6], []]}


def served(name: str, *features: str) -> ServedTable:
    return ServedTable(name, features, QR, S, "error", False, ("fp32", "fp32"))


def rows_of(weights: list[Tensor], ids: list[int]) -> Tensor:
    x = torch.tensor(ids, dtype=torch.int64)
    return weights[0][x % 25] * weights[1][x // 25]


class Pooled(nn.Module):
    def __init__(self, weighted: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = nn.ParameterList([torch.randn(n, 8, generator=generator) for n in (25, 4, 25, 4)])
        self.layout, self.names = served_layout([served("t", "f", "g"), served("u", "g")])
        self.weighted = weighted

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return served_batch.served_pooled(features, list(self.parts), [], self.layout, self.names, self.weighted, 24)


def scripted(module: nn.Module) -> Any:
    return torch.jit.script(torchrec.fx.symbolic_trace(module))


@pytest.mark.parametrize("made", [lambda module: module, torchrec.fx.symbolic_trace, scripted])
def test_features_are_found_by_their_names(made: Any) -> None:
    module = Pooled()
    parts = [w.detach() for w in module.parts]
    expected = torch.zeros(2, 24)
    for b in range(2):
        for column, feature, own in [(0, "f", parts[:2]), (8, "g", parts[:2]), (16, "g", parts[2:])]:
            expected[b, column : column + 8] = rows_of(own, BATCH[feature][b]).sum(0)
    torch.testing.assert_close(made(module)(batch(BATCH)), expected)


@pytest.mark.parametrize("made", [lambda module: module, torchrec.fx.symbolic_trace, scripted])
def test_weights_of_ids_count(made: Any) -> None:
    weights = torch.tensor([7.0, 1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    module = Pooled(weighted=True)
    out = made(module)(batch(BATCH, weights))
    parts = [w.detach() for w in module.parts]
    torch.testing.assert_close(out[1, 8:16], (rows_of(parts, [3, 99]) * torch.tensor([[2.0], [3.0]])).sum(0))


@pytest.mark.parametrize("made", [lambda module: module, scripted])
def test_sequences_have_the_rows_the_lengths_and_the_ids(made: Any) -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(25, 8)), nn.Parameter(torch.randn(4, 8))
            self.layout, self.names = served_layout([served("t", "f")])
            self.other = served_layout([served("t", "g")])[1]

        def forward(self, features: KeyedJaggedTensor) -> list[Tensor]:
            own = [self.a, self.b]
            out = served_batch.served_sequences(
                features,
                [own, own],
                [[], []],
                [self.layout, self.layout],
                [self.names, self.other],
                ["f", "g"],
                [8, 8],
                [("error", S), ("error", S)],
            )
            f, g = out["f"], out["g"]
            return [f.values(), f.lengths(), f.weights(), g.values(), g.lengths(), g.weights()]

    module = Sequences()
    f, f_lengths, f_ids, g, g_lengths, g_ids = made(module)(batch(BATCH))
    own = [module.a.detach(), module.b.detach()]
    assert torch.equal(f, rows_of(own, [5, 6]))
    assert torch.equal(g, rows_of(own, [2, 3, 99]))
    assert f_lengths.tolist() == [2, 0]
    assert g_lengths.tolist() == [1, 2]
    assert (f_ids.tolist(), g_ids.tolist()) == ([5, 6], [2, 3, 99])


def test_batches_that_do_not_fit_are_refused() -> None:
    module = Pooled()
    arguments = (list(module.parts), [], module.layout, module.names)

    def pooled(features: KeyedJaggedTensor, weighted: bool = False) -> Tensor:
        return served_pooled(features, *arguments, weighted, 24)

    with pytest.raises(IndexError, match=r"table 't', feature 'g': id 100 is outside \[0, 100\)"):
        pooled(batch({"g": [[100]], "f": [[1]]}))
    layout, names = served_layout([served("t", "f")])
    with pytest.raises(IndexError, match=r"table 't', feature 'f': id -1 is outside \[0, 100\)"):
        served_sequences(batch({"f": [[-1]]}), [list(module.parts[:2])], [[]], [layout], [names], ["f"], [8], [])
    with pytest.raises(KeyError, match=r"table 't': feature 'f' is not in the batch; its keys are \['g'\]"):
        pooled(batch({"g": [[1]]}))
    with pytest.raises(ValueError, match="a weighted collection got a batch without weights"):
        pooled(batch(BATCH), weighted=True)
    with pytest.raises(ValueError, match="1 weights for 6 ids"):
        pooled(batch(BATCH, torch.ones(1)), weighted=True)
    with pytest.raises(TypeError, match=r"ids have dtype torch\.float32; allowed: int32, int64"):
        pooled(KeyedJaggedTensor(keys=["f", "g"], values=torch.ones(2), lengths=torch.tensor([1, 1])))
    for made in (module, scripted(module)):
        with pytest.raises(Exception, match="3 lengths; allowed: one of each bag of the 2 features"):
            made(KeyedJaggedTensor(keys=["f", "g"], values=torch.arange(6), lengths=torch.tensor([2, 2, 2])))
    varying = KeyedJaggedTensor(
        keys=["f", "g"],
        values=torch.tensor([1, 2]),
        lengths=torch.tensor([1, 1, 0]),
        stride_per_key_per_rank=[[1], [2]],
    )
    with pytest.raises(NotImplementedError, match="one number of bags for all"):
        pooled(varying)


def test_rows_on_the_meta_device_have_no_values() -> None:
    module = Pooled().to("meta")
    assert module(batch(BATCH)).device.type == "meta"
    assert scripted(module)(batch(BATCH)).device.type == "meta"
