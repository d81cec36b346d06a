"""Modules behave as TorchRec's do: storage types, state dicts, devices, copies, batches of every form."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from batches import batch
from single_tables import bag_table
from small_collections import (
    BATCH,
    OPERATIONS,
    S,
    assert_equal,
    collection,
    each_kind,
    each_operation,
    outputs,
    partitions_of,
    pooled_or_not,
)
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import PoolingType

from benchmarks.quality.feature_generation import FeatureGenerationEmbeddingBagCollection
from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    ExplicitPartitions,
    QuotientRemainder,
)
from torchrec_qr.ops.backends import cpu
from torchrec_qr.ops.cpu_library import without_kernels

# --- storage types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
@each_operation
def test_a_converted_module_computes_with_the_converted_rows(operation: str, convert: str) -> None:
    module = collection(partitions_of("explicit"), **OPERATIONS[operation])
    converted = getattr(copy.deepcopy(module), convert)()
    with torch.no_grad():
        for p, q in zip(module.parameters(), converted.parameters(), strict=True):
            p.copy_(q)
    for out, expected in zip(outputs(converted, BATCH), outputs(module, BATCH), strict=True):
        assert out.dtype == torch.float32
        tolerance = 2e-2 if convert == "bfloat16" else 2e-3
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(converted.state_dict()[key(True, "fingerprint")], module.state_dict()[key(True, "fingerprint")])


# --- state dicts ---------------------------------------------------------------------------------------------------


def key(pooled: bool, name: str) -> str:
    return f"{'embedding_bags' if pooled else 'embeddings'}.t.{name}"


@each_operation
@each_kind
@pooled_or_not
def test_state_dict_keys_and_shapes_are_the_contracts(pooled: bool, kind: str, operation: str) -> None:
    module = collection(partitions_of(kind), pooled, **OPERATIONS[operation])
    top = "embedding_bags" if pooled else "embeddings"
    first, second = partitions_of(kind).bind(S).sizes
    widths = {"concat": (4, 4), "path": (8, 72), "path_hidden": (8, 59)}.get(operation, (8, 8))
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        f"{top}.t.partition_0.weight": (first, widths[0]),
        f"{top}.t.partition_1.weight": (second, widths[1]),
        f"{top}.t.fingerprint": (12,),
        f"{top}.p.weight": (10, 4),
    }
    assert [name for name, _ in module.named_parameters()] == [
        *(f"{top}.t.partition_0.weight", f"{top}.t.partition_1.weight", f"{top}.p.weight")
    ]


@each_operation
@each_kind
@pooled_or_not
def test_a_state_dict_loads_into_an_equal_module(pooled: bool, kind: str, operation: str) -> None:
    saved = collection(partitions_of(kind), pooled, **OPERATIONS[operation])
    loaded = collection(partitions_of(kind), pooled, seed=1, **OPERATIONS[operation])
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(outputs(loaded, BATCH), outputs(saved, BATCH))


EXPLICIT = torch.tensor([[x % 10 for x in range(S)], [x // 10 for x in range(S)]])
# Partitions of equal and of other shapes; `test_fingerprint` has every field that differs.
OTHER_MEANINGS: dict[str, tuple[QuotientRemainder, str]] = {
    "grouping": (QuotientRemainder(num_collisions=10, grouping="adjacent"), "grouping: saved strided, here adjacent"),
    "sizes": (QuotientRemainder(num_collisions=5), "sizes: saved [10, 10], here [20, 5]"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("what", OTHER_MEANINGS)
@pooled_or_not
def test_a_checkpoint_of_another_meaning_is_refused(pooled: bool, what: str, assign: bool) -> None:
    own, phrase = OTHER_MEANINGS[what]
    state = collection(QuotientRemainder(num_collisions=10), pooled).state_dict()
    module = collection(own, pooled, seed=1)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match="table 't': the checkpoint is of another table") as error:
        module.load_state_dict(state, assign=assign)
    assert phrase in str(error.value)
    assert_equal([p.detach() for p in module.parameters()], before)


def test_a_checkpoint_without_a_fingerprint_is_refused_unless_asked_for() -> None:
    module = collection(partitions_of("strided"))
    state = collection(partitions_of("strided"), seed=1).state_dict()
    del state[key(True, "fingerprint")]
    with pytest.raises(RuntimeError, match=r"Missing key.*embedding_bags\.t\.fingerprint"):
        module.load_state_dict(state)
    module.load_state_dict(state, strict=False)
    assert torch.equal(module.state_dict()[key(True, "partition_0.weight")], state[key(True, "partition_0.weight")])


def test_generated_features_and_their_composition_do_not_load_into_one_another() -> None:
    table = bag_table(partitions_of("strided"))
    generated = FeatureGenerationEmbeddingBagCollection(tables=[table])
    composed = CompositionalEmbeddingBagCollection(tables=[table])
    with pytest.raises(ValueError, match="operation: saved concat, here mult"):
        composed.load_state_dict(generated.state_dict())


# --- devices -------------------------------------------------------------------------------------------------------


@each_operation
@each_kind
@pooled_or_not
def test_meta_modules_come_to_life(pooled: bool, kind: str, operation: str) -> None:
    def on_meta() -> Any:
        module = collection(partitions_of(kind), pooled, torch.device("meta"), **OPERATIONS[operation])
        assert module.device.type == "meta"
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
        return module

    built = collection(partitions_of(kind), pooled, **OPERATIONS[operation])
    expected = outputs(built, BATCH)

    assigned = on_meta()
    assigned.load_state_dict(built.state_dict(), assign=True)
    assert_equal(outputs(assigned, BATCH), expected)

    assert_equal(outputs(built.to("cpu"), BATCH), expected)


@each_kind
def test_a_meta_module_of_a_model_comes_to_life_with_it(kind: str) -> None:
    built = nn.Sequential(collection(partitions_of(kind)))
    model = nn.Sequential(collection(partitions_of(kind), device=torch.device("meta")))
    model.load_state_dict(built.state_dict(), assign=True)
    assert_equal(outputs(model, BATCH), outputs(built, BATCH))


@pooled_or_not
def test_the_default_device_holds_for_both_kinds_of_tables(pooled: bool) -> None:
    with torch.device("meta"):
        partitions = ExplicitPartitions(EXPLICIT.tolist())
        module = collection(partitions, pooled, torch.device("cpu"))
        assert {p.device.type for p in module.parameters()} == {"cpu"}
        plain = EmbeddingBagConfig(name="p", feature_names=["g"], num_embeddings=S, embedding_dim=8)
        implicit = CompositionalEmbeddingBagCollection(tables=[bag_table(partitions), plain])
    assert {t.device.type for t in (*implicit.parameters(), *implicit.buffers())} == {"meta"}


# --- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])  # noqa: S301
@each_operation
@each_kind
@pooled_or_not
def test_copies_are_equal_and_independent(
    pooled: bool, kind: str, operation: str, how: Callable[[nn.Module], nn.Module]
) -> None:
    module = collection(partitions_of(kind), pooled, **OPERATIONS[operation])
    expected = outputs(module, BATCH)
    twin = how(module)
    assert_equal(outputs(twin, BATCH), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert_equal(outputs(module, BATCH), expected)
    assert all(not bool(out.any()) for out in outputs(twin, BATCH))
    twin.load_state_dict(module.state_dict())
    assert_equal(outputs(twin, BATCH), expected)


# --- forms of batches ----------------------------------------------------------------------------------------------


def plain_tables() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name="a", num_embeddings=10, embedding_dim=4, feature_names=["f", "g"]),
        EmbeddingBagConfig(name="b", num_embeddings=10, embedding_dim=8, feature_names=["f"], pooling=PoolingType.MEAN),
    ]


def stock_and_ours() -> tuple[EmbeddingBagCollection, CompositionalEmbeddingBagCollection]:
    stock, ours = EmbeddingBagCollection(tables=plain_tables()), CompositionalEmbeddingBagCollection(plain_tables())
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def variable_batch() -> KeyedJaggedTensor:
    """f has 2 distinct samples and g 3; the inverse indices spread both over 4."""
    return KeyedJaggedTensor(
        keys=["f", "g"],
        values=torch.tensor([1, 2, 3, 4, 5, 6]),
        lengths=torch.tensor([1, 2, 0, 2, 1]),
        stride_per_key_per_rank=[[2], [3]],
        inverse_indices=(["f", "g"], torch.tensor([[0, 1, 1, 0], [2, 0, 1, 2]])),
    )


def test_plain_tables_agree_with_torchrec_on_variable_batches() -> None:
    stock, ours = stock_and_ours()
    expected, out = stock(variable_batch()), ours(variable_batch())
    assert (out.keys(), out.length_per_key()) == (expected.keys(), expected.length_per_key())
    assert torch.equal(out.values(), expected.values())
    assert out.values().shape == (4, 16)


@each_operation
def test_variable_batches_of_compositional_tables(operation: str) -> None:
    module = collection(partitions_of("strided"), **OPERATIONS[operation])
    out = module(variable_batch())
    dense = module(batch({"f": [[1], [2, 3], [2, 3], [1]], "g": [[6], [], [4, 5], [6]]}))
    torch.testing.assert_close(out.values(), dense.values())


def test_tensor_dicts_agree_with_torchrec() -> None:
    stock, ours = stock_and_ours()
    per_feature = {"f": [[1, 5, 9], []], "g": [[3], [4]]}
    kjt = batch(per_feature)
    features = TensorDict(
        {f: torch.nested.nested_tensor_from_jagged(kjt[f].values(), kjt[f].offsets()) for f in per_feature}
    )
    assert torch.equal(ours(features).values(), stock(features).values())
    assert torch.equal(ours(features).values(), ours(kjt).values())


def test_outputs_regroup() -> None:
    module = collection(partitions_of("strided"))
    one, two = module(batch(BATCH)), collection(partitions_of("explicit"), seed=1)(batch(BATCH))
    both = KeyedTensor(
        keys=["f2", "g2"], length_per_key=two.length_per_key(), values=two.values()
    )  # regroup requires distinct keys
    first, second = KeyedTensor.regroup([one, both], [["g", "f2"], ["f"]])
    assert torch.equal(first, torch.cat([one["g"], two["f"]], dim=1))
    assert torch.equal(second, one["f"])


def test_keys_of_a_batch_come_in_any_order_and_may_be_more() -> None:
    module = collection(partitions_of("strided"))
    reordered = {"unused": [[10**9], [], []], "g": BATCH["g"], "f": BATCH["f"]}
    assert_equal(outputs(module, reordered), outputs(module, BATCH))


@pytest.mark.parametrize("per_feature", [{"f": [[], []], "g": [[], []]}, {"f": [], "g": []}], ids=["no ids", "no bags"])
@each_operation
@each_kind
@pooled_or_not
def test_empty_batches_give_zero_gradients_rather_than_none(
    pooled: bool, kind: str, operation: str, per_feature: dict[str, list[list[int]]]
) -> None:
    module = collection(partitions_of(kind), pooled, **OPERATIONS[operation])
    results = outputs(module, per_feature)
    samples = len(per_feature["f"]) if pooled else 0
    assert_equal([r.detach() for r in results], [torch.zeros(samples, 8), torch.zeros(samples, 4)])
    torch.stack([r.sum() for r in results]).sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert torch.equal(p.grad, torch.zeros_like(p)), name


# --- memory --------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_iter(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("operation", ["add", "concat", "mult"])
@pytest.mark.parametrize("kernels", [False, True])
def test_no_tensor_of_a_row_per_id_is_made(kernels: bool, operation: str, weighted: bool) -> None:
    """The kernels never make one; PyTorch makes none if composition and sum commute."""
    if kernels and not cpu.available():
        pytest.skip("the CPU kernels are not built")
    n, dim = 4000, 64
    table = bag_table(QuotientRemainder(num_collisions=10), embedding_dim=dim, operation=operation)
    ebc = CompositionalEmbeddingBagCollection(tables=[table], is_weighted=weighted)
    ids = [i % S for i in range(n)]
    weights = torch.ones(n, requires_grad=True) if weighted else None
    kjt = batch({"f": [ids[: n // 2], ids[n // 2 :]]}, weights)
    with nullcontext() if kernels else without_kernels(), LargestTensor() as largest:
        ebc(kjt).values().sum().backward()
    if operation == "mult" and not kernels:
        assert largest.numel >= n * dim  # what the other two avoid, so this test would see it
    else:
        assert largest.numel <= n


# --- the interface of TorchRec's collections -----------------------------------------------------------------------


def test_configs_are_logical() -> None:
    module = collection(partitions_of("strided"))
    assert [(t.name, t.num_embeddings, t.embedding_dim) for t in module.embedding_bag_configs()] == [
        ("t", 100, 8),
        ("p", 10, 4),
    ]
    assert not module.is_weighted()
    sequence = collection(partitions_of("strided"), pooled=False)
    assert [(t.name, t.num_embeddings) for t in sequence.embedding_configs()] == [("t", 100), ("p", 10)]
    assert sequence.embedding_names_by_table() == [["f"], ["g"]]
    assert not sequence.need_indices()


def test_a_table_without_feature_names_takes_its_own() -> None:
    table = bag_table(partitions_of("strided"), name="user", feature_names=[])
    out = CompositionalEmbeddingBagCollection(tables=[table])(batch({"user": [[3]]}))
    assert out.keys() == ["user"]
