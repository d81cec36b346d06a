"""An existing model, compressed in place: what is replaced, what stays, and what the report has."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingCollection,
    CompositionalEmbeddingConfig,
    MixedRadix,
    QuotientRemainder,
    compress_,
)

QR = QuotientRemainder(num_collisions=10)


def bags(**fields: Any) -> list[EmbeddingBagConfig]:
    """A small table between two large ones, the first with two features and bounds of its own."""
    return [
        EmbeddingBagConfig(
            name="t_user",
            feature_names=["user", "friend"],
            num_embeddings=1_000,
            embedding_dim=8,
            weight_init_min=-0.5,
            weight_init_max=0.25,
            pooling=PoolingType.MEAN,
            **fields,
        ),
        EmbeddingBagConfig(name="t_day", feature_names=["day"], num_embeddings=7, embedding_dim=4, **fields),
        EmbeddingBagConfig(name="t_item", feature_names=["item"], num_embeddings=500, embedding_dim=8, **fields),
    ]


def sequences() -> list[EmbeddingConfig]:
    return [
        EmbeddingConfig(name="t_word", feature_names=["word"], num_embeddings=300, embedding_dim=8),
        EmbeddingConfig(name="t_tag", feature_names=["tag", "day"], num_embeddings=9, embedding_dim=8),
    ]


class TwoKinds(nn.Module):
    """A collection of bags, and one of sequences two levels down."""

    def __init__(self, device: str = "cpu", **fields: Any) -> None:
        super().__init__()
        self.bags = EmbeddingBagCollection(tables=bags(**fields), device=torch.device(device))
        inner = EmbeddingCollection(
            tables=sequences(), device=torch.device(device), need_indices=True, use_gather_select=True
        )
        self.arch = nn.ModuleDict({"words": nn.ModuleList([nn.Identity(), inner])})

    @property
    def words(self) -> Any:
        return self.arch["words"][1]


def batch() -> KeyedJaggedTensor:
    ids = {"user": [999, 1], "friend": [5, 5], "day": [6, 0], "item": [499, 2], "word": [299, 7], "tag": [8, 8]}
    return KeyedJaggedTensor(
        keys=list(ids), values=torch.tensor([x for of in ids.values() for x in of]), lengths=torch.ones(12).long()
    )


def compressed(**given: Any) -> tuple[Any, Any, Any]:
    """Returns the model, a copy from before, and the report."""
    model = TwoKinds()
    before = copy.deepcopy(model)
    return model, before, compress_(model, QR, min_rows=100, **given)


def test_collections_are_replaced_where_they_were() -> None:
    model, before, _ = compressed()
    assert type(model.bags) is CompositionalEmbeddingBagCollection
    assert type(model.words) is CompositionalEmbeddingCollection
    assert [name for name, _ in model.named_children()] == ["bags", "arch"]
    assert not model.bags.is_weighted()
    assert model.words.need_indices()
    assert model.words.use_gather_select()
    assert model.words.embedding_dim() == 8
    out, expected = model.bags(batch()), before.bags(batch())
    assert out.keys() == expected.keys() == ["user", "friend", "day", "item"]
    assert out.values().shape == expected.values().shape
    assert torch.equal(out["day"], expected["day"])
    of_words, expected_words = model.words(batch()), before.words(batch())
    assert list(of_words) == list(expected_words) == ["word", "tag", "day"]
    assert torch.equal(of_words["day"].values(), expected_words["day"].values())
    assert of_words["word"].weights().tolist() == [299, 7]


def test_configs_keep_everything_but_the_storage() -> None:
    model, before, _ = compressed(operation="add")
    kinds = [type(c) for c in model.bags.embedding_bag_configs()]
    assert kinds == [CompositionalEmbeddingBagConfig, EmbeddingBagConfig, CompositionalEmbeddingBagConfig]
    assert [type(c) for c in model.words.embedding_configs()] == [CompositionalEmbeddingConfig, EmbeddingConfig]
    pairs = zip(model.bags.embedding_bag_configs(), before.bags.embedding_bag_configs(), strict=True)
    for new, old in pairs:
        for field in ("name", "feature_names", "num_embeddings", "embedding_dim", "data_type", "pooling"):
            assert getattr(new, field) == getattr(old, field)
        assert new.get_weight_init_min() == old.get_weight_init_min()
        assert new.get_weight_init_max() == old.get_weight_init_max()
    user = model.bags.embedding_bag_configs()[0]
    assert (user.partitions, user.operation, user.physical_rows) == (QR, "add", 110)
    main = model.bags.embedding_bags["t_user"].partition_0.weight.detach()
    assert -0.5 <= float(main.min()) < -0.4
    assert 0.2 < float(main.max()) <= 0.25


def test_plain_tables_keep_their_parameters() -> None:
    model = TwoKinds()
    kept = [model.bags.embedding_bags["t_day"].weight, model.words.embeddings["t_tag"].weight]
    kept[0].requires_grad_(False)
    optimizer = torch.optim.SGD([kept[1]], lr=1.0)
    values = [w.detach().clone() for w in kept]
    compress_(model, QR, min_rows=100)
    assert model.bags.embedding_bags["t_day"].weight is kept[0]
    assert model.words.embeddings["t_tag"].weight is kept[1]
    assert not kept[0].requires_grad
    model.words(batch())["tag"].values().sum().backward()
    optimizer.step()
    assert torch.equal(kept[0], values[0])
    assert torch.equal(kept[1][8], values[1][8] - 2)
    assert set(model.state_dict()) >= {"bags.embedding_bags.t_day.weight", "bags.embedding_bags.t_item.fingerprint"}


def test_the_report_has_rows_bytes_and_totals() -> None:
    _, _, report = compressed(tables={"t_user": MixedRadix(balanced=True, num_partitions=3), "t_word": None})
    assert str(report).splitlines() == [
        "table    rows  stored rows    MiB  stored MiB  ratio  partitions",
        "t_user  1,000           30  0.031       0.001  33.33  mult of 10 + 10 + 10",
        "t_day       7            7  0.000       0.000   1.00  plain",
        "t_item    500           60  0.015       0.002   8.33  mult of 50 + 10",
        "t_word    300          300  0.009       0.009   1.00  plain",
        "t_tag       9            9  0.000       0.000   1.00  plain",
        "total   1,816          406  0.055       0.012   4.50",
    ]
    assert report.bytes_before == (1_000 + 500 + 300 + 9) * 32 + 7 * 16
    assert report.bytes_after == (30 + 60 + 300 + 9) * 32 + 7 * 16
    assert [t.collection for t in report.tables] == ["bags"] * 3 + ["arch.words.1"] * 2


def rows_within(size: int, limit: int) -> int:
    """The rows of m collisions, the fewest that keep within the limit, or of those with the fewest rows."""
    if size <= limit:
        return size
    rows = [-(-size // m) + -(-size // -(-size // m)) for m in range(2, size + 1)]
    return next((r for r in rows if r <= limit), min(rows))


@pytest.mark.parametrize("budget", [49_680, 49_679, 12_000, 5_500, 5_200])
def test_a_budget_takes_the_most_rows_that_fit(budget: int) -> None:
    model = TwoKinds()
    report = compress_(model, budget=budget, min_rows=100, tables={"t_word": QR})
    assert report.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())
    user, item = max(
        (user, item)
        for user, item in ((rows_within(1_000, c), rows_within(500, c)) for c in range(1, 1_001))
        if 32 * (user + item + 40 + 9) + 7 * 16 <= budget
    )
    assert [t.stored_rows for t in report.tables] == [user, 7, item, 40, 9]
    assert f"budget {budget / 2**20:.3f} MiB" in str(report)


def test_a_shared_collection_stays_shared() -> None:
    model = TwoKinds()
    model.again = nn.Sequential(model.bags)
    compress_(model, QR, min_rows=100)
    assert model.again[0] is model.bags
    assert type(model.bags) is CompositionalEmbeddingBagCollection


def test_a_second_call_compresses_nothing_twice() -> None:
    model, _, first = compressed(tables={"t_user": None})
    model.more = EmbeddingBagCollection(tables=[EmbeddingBagConfig(name="t", num_embeddings=400, embedding_dim=4)])
    ours = model.bags
    second = compress_(model, QR, min_rows=100)
    assert model.bags is ours
    assert [t.stored_rows for t in second.tables] == [*[t.stored_rows for t in first.tables], 50]


def test_a_model_on_the_meta_device_stays_there() -> None:
    model = TwoKinds(device="meta")
    day = model.bags.embedding_bags["t_day"].weight
    compress_(model, QR, min_rows=100)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.bags.embedding_bags["t_day"].weight is day
    assert model.bags.embedding_bags["t_user"].partition_0.weight.shape == (100, 8)


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_stays(mode: bool) -> None:
    model = TwoKinds().train(mode)
    compress_(model, QR, min_rows=100)
    assert {m.training for m in model.modules()} == {mode}


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
def test_data_types_stay(data_type: DataType) -> None:
    model = TwoKinds(data_type=data_type)
    day = model.bags.embedding_bags["t_day"].weight
    compress_(model, QR, min_rows=100)
    user = model.bags.embedding_bags["t_user"]
    expected = torch.float16 if data_type == DataType.FP16 else torch.bfloat16
    assert [w.dtype for w in user.weights()] == [expected, torch.float32]
    assert model.bags.embedding_bags["t_day"].weight is day
    assert day.dtype == torch.float16  # so are all of TorchRec's
    assert model.bags(batch())["day"].dtype == torch.float32


def test_optimizers_in_backward_step_partitions_and_plain_tables() -> None:
    model = TwoKinds()
    _apply_optimizer_in_backward(RowWiseAdagrad, model.bags.parameters(), {"lr": 0.5, "eps": 1e-3})
    for p in model.bags.parameters():
        p._in_backward_optimizers[0].param_groups[0]["lr"] = 0.25
    compress_(model, QR, min_rows=100)
    for name, p in model.bags.named_parameters():
        (optimizer,), (kind,), (kwargs,) = p._in_backward_optimizers, p._optimizer_classes, p._optimizer_kwargs
        assert type(optimizer) is kind is RowWiseAdagrad
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["eps"]) == (0.25, 1e-3), name
        assert (kwargs["lr"], kwargs["eps"]) == (0.5 if "t_day" in name else 0.25, 1e-3)
    before = {name: p.detach().clone() for name, p in model.bags.named_parameters()}
    model.bags(batch()).values().sum().backward()
    assert all(not torch.equal(before[name], p) and p.grad is None for name, p in model.bags.named_parameters())


def test_a_feature_processor_keeps_its_collection() -> None:
    collection = EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="t", feature_names=["f"], num_embeddings=200, embedding_dim=4)],
        is_weighted=True,
    )
    model = nn.ModuleList(
        [FeatureProcessedEmbeddingBagCollection(collection, {"f": PositionWeightedModule(max_feature_length=4)})]
    )
    compress_(model, QR, min_rows=100)
    ids = KeyedJaggedTensor(keys=["f"], values=torch.tensor([3, 199]), lengths=torch.tensor([2]))
    assert model[0]._embedding_bag_collection.is_weighted()
    assert torch.equal(model[0](ids).values(), model[0]._embedding_bag_collection(with_weights(ids)).values())


def with_weights(ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(ids.keys(), ids.values(), torch.ones(2), ids.lengths())


def test_random_numbers_are_those_of_a_new_collection() -> None:
    """The partitions of a seed are those that a collection of the same compressed tables draws."""
    model = nn.ModuleList([EmbeddingBagCollection(tables=bags()[2:])])
    torch.manual_seed(3)
    compress_(model, QR, min_rows=100)
    torch.manual_seed(3)
    anew = CompositionalEmbeddingBagCollection(tables=model[0].embedding_bag_configs())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), anew.parameters(), strict=True))


@pytest.mark.parametrize(
    ("operation", "rows"), [("mult", lambda a, b: a * b), ("add", lambda a, b: a + b), ("concat", None)]
)
def test_a_fitted_model_starts_near_the_full_one(operation: Any, rows: Callable[..., Any] | None) -> None:
    """A full table that partitions compose is found again, beside one that no partitions compose."""
    model = TwoKinds()
    generator = torch.Generator().manual_seed(1)
    main, other = torch.randn(100, 8, generator=generator), torch.randn(10, 8, generator=generator)
    ids = torch.arange(1_000)
    first, second = main[ids % 100], other[ids // 100]
    full = torch.cat([first[:, :4], second[:, 4:]], dim=1) if rows is None else rows(first, second)
    with torch.no_grad():
        model.bags.embedding_bags["t_user"].weight.copy_(full)
    model.bags.embedding_bags["t_item"].weight.requires_grad_(False)
    expected = model.bags(batch())
    report = compress_(model, QR, min_rows=100, operation=operation, fit=True, frequencies={"t_item": torch.ones(500)})
    errors = {t.name: (t.error, t.weighted_error) for t in report.tables}
    assert errors["t_user"][0] == pytest.approx(0, abs=1e-5)
    assert errors["t_user"][1] is errors["t_day"][0] is None
    assert 0.5 < errors["t_item"][0] < 1
    assert errors["t_item"][1] == pytest.approx(errors["t_item"][0], rel=1e-6)
    out = model.bags(batch())
    torch.testing.assert_close(out["user"], expected["user"], rtol=1e-4, atol=1e-5)
    assert [p.requires_grad for p in model.bags.embedding_bags["t_item"].parameters()] == [False, False]
    head, line = str(report).splitlines()[:2]
    assert head.endswith("  error  weighted error  partitions")
    assert "0.0000" in line


def test_own_initial_values_are_replaced_by_a_fit_alone() -> None:
    configs = [
        EmbeddingBagConfig(name="t", num_embeddings=200, embedding_dim=4, init_fn=partial(nn.init.constant_, val=3.0))
    ]
    model = nn.ModuleList([EmbeddingBagCollection(tables=configs)])
    with pytest.raises(ValueError, match="table 't' of '0' has an init_fn of its own"):
        compress_(model, QR, min_rows=100)
    (line,) = compress_(model, QR, min_rows=100, fit=True).tables
    assert line.error == pytest.approx(0, abs=1e-6)
