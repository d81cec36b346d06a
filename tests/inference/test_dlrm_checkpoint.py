"""Checkpoints of facebookresearch/dlrm have equal outputs here. The reference computes as its bags are documented."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_qr import QuotientRemainder
from torchrec_qr.inference import load_dlrm_checkpoint, materialize

# The rows S of each table, by --arch-embedding-size, of which the first and the third are above --qr-threshold.
NUM_IDS, COMPRESSED = (103, 12, 40), (0, 2)
COLLISIONS, DIM = 4, 8


def saved_state(collisions: int = COLLISIONS) -> dict[str, Any]:
    """The parameters of dlrm's embeddings, with a layer of another part."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Any] = OrderedDict()
    for i, rows in enumerate(NUM_IDS):
        if i in COMPRESSED:
            state[f"emb_l.{i}.weight_q"] = torch.randn(-(-rows // collisions), DIM, generator=generator)
            state[f"emb_l.{i}.weight_r"] = torch.randn(collisions, DIM, generator=generator)
        else:
            state[f"emb_l.{i}.weight"] = torch.randn(rows, DIM, generator=generator)
    return state | {"bot_l.0.weight": torch.randn(4, 4, generator=generator)}


def saved_file(state: dict[str, Any]) -> dict[str, Any]:
    """What --save-model writes: numbers of NumPy, and the optimizer's state, beside the parameters."""
    weights = [torch.nn.Parameter(w) for w in state.values()]
    optimizer = torch.optim.Adagrad(weights)
    metrics = {"epoch": 0, "nepochs": 1, "iter": 7, "train_loss": 0.5, "total_loss": np.float32(3.5)}
    test = {"test_acc": np.float64(0.75), "nbatches_test": np.int64(9)}
    return {**metrics, **test, "state_dict": state, "opt_state_dict": optimizer.state_dict()}


def reference(state: dict[str, Any], i: int, operation: str, indices: Tensor, offsets: Tensor) -> Tensor:
    """A bag is the ids from its offset to the next. Each table of a pair is pooled, then the two are composed."""
    ends = [*offsets[1:].tolist(), len(indices)]
    out = []
    for start, end in zip(offsets.tolist(), ends, strict=True):
        ids = indices[start:end].tolist()
        if i not in COMPRESSED:
            out.append(sum((state[f"emb_l.{i}.weight"][x] for x in ids), torch.zeros(DIM)))
            continue
        quotient, remainder = state[f"emb_l.{i}.weight_q"], state[f"emb_l.{i}.weight_r"]
        q = sum((quotient[x // len(remainder)] for x in ids), torch.zeros(DIM))
        r = sum((remainder[x % len(remainder)] for x in ids), torch.zeros(DIM))
        out.append(torch.cat([q, r]) if operation == "concat" else q + r if operation == "add" else q * r)
    return torch.stack(out)


def random_bags(sizes: list[int], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """dlrm's lS_i and lS_o: the indices and the offsets of each table, of bags of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *np.cumsum(sizes[:-1]).tolist()])
    return [torch.randint(n, (sum(sizes),), generator=generator) for n in NUM_IDS], [offsets] * len(NUM_IDS)


def as_features(indices: list[Tensor], offsets: list[Tensor]) -> KeyedJaggedTensor:
    lengths = [torch.diff(o, append=torch.tensor([len(i)])) for i, o in zip(indices, offsets, strict=True)]
    keys = [f"cat_{i}" for i in range(len(indices))]
    return KeyedJaggedTensor(keys=keys, values=torch.cat(indices), lengths=torch.cat(lengths))


@pytest.mark.parametrize("collisions", [1, 4, 60])
@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_outputs_of_bags_of_one_id_are_equal(operation: Any, collisions: int) -> None:
    """The third table has fewer ids than 60 collisions, and one row of quotients."""
    state = saved_state(collisions=collisions)
    ebc = load_dlrm_checkpoint({"state_dict": state}, operation=operation, multi_hot=False)
    indices, offsets = random_bags([1] * 500 + [0, 1, 0], seed=1)
    out = ebc(as_features(indices, offsets))
    for i in range(len(NUM_IDS)):
        assert torch.equal(out[f"cat_{i}"], reference(state, i, operation, indices[i], offsets[i])), i


@pytest.mark.parametrize("operation", ["add", "concat"])
def test_outputs_of_bags_of_several_ids_are_equal_up_to_roundings(operation: Any) -> None:
    state = saved_state()
    ebc = load_dlrm_checkpoint(state, operation=operation, multi_hot=True)
    indices, offsets = random_bags([3, 0, 1, 10, 2], seed=2)
    out = ebc(as_features(indices, offsets))
    for i in range(len(NUM_IDS)):
        expected = reference(state, i, operation, indices[i], offsets[i])
        torch.testing.assert_close(out[f"cat_{i}"], expected, rtol=1e-5, atol=1e-5)


def test_products_of_bags_of_several_ids_are_refused() -> None:
    """dlrm multiplies sums, and a collection sums products: for ids 5 and 38 they differ."""
    state = saved_state()
    for flag in (None, True):
        with pytest.raises(ValueError, match=rf"emb_l\.0: multi_hot={flag}, .* allowed: multi_hot=False, if every"):
            load_dlrm_checkpoint(state, operation="mult", multi_hot=flag)
    ids, offsets = torch.tensor([5, 38]), torch.tensor([0])
    ebc = load_dlrm_checkpoint(state, operation="mult", multi_hot=False)
    own = materialize(ebc, "t_cat_0", ids).sum(dim=0)
    assert (own - reference(state, 0, "mult", ids, offsets)[0]).abs().max() > 0.1


@pytest.mark.parametrize("by_zip", [True, False])
def test_a_file_of_save_model(by_zip: bool, tmp_path: Path) -> None:
    """Files of PyTorch before 1.6 are no zip files, and those of NumPy 1 name its classes by another module."""
    state = saved_state()
    path = tmp_path / "dlrm.pt"
    torch.save(saved_file(state), path, _use_new_zipfile_serialization=by_zip)
    if not by_zip:
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    ebc = load_dlrm_checkpoint(path, operation="mult", multi_hot=False)
    path.unlink()
    configs = ebc.embedding_bag_configs()
    assert [(c.name, c.feature_names, c.num_embeddings) for c in configs] == [
        ("t_cat_0", ["cat_0"], 104),
        ("t_cat_1", ["cat_1"], 12),
        ("t_cat_2", ["cat_2"], 40),
    ]
    assert [c.pooling for c in configs] == [PoolingType.SUM] * 3
    assert [c.data_type for c in configs] == [DataType.FP32] * 3
    first = ebc.embedding_bags["t_cat_0"]
    assert first.config.partitions == QuotientRemainder(num_collisions=4, grouping="adjacent")
    assert torch.equal(first.partition_0.weight, state["emb_l.0.weight_q"])
    assert torch.equal(first.partition_1.weight, state["emb_l.0.weight_r"])
    assert torch.equal(ebc.embedding_bags["t_cat_1"].weight, state["emb_l.1.weight"])
    # A state dict of it loads into the same collection of another model.
    other = load_dlrm_checkpoint({k: v * 0 for k, v in state.items()}, operation="mult", multi_hot=False)
    other.load_state_dict(ebc.state_dict())
    assert torch.equal(materialize(other, "t_cat_2"), materialize(ebc, "t_cat_2"))
    ebc(as_features(*random_bags([1], seed=3))).values().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in ebc.parameters())


def test_names_and_numbers_of_ids_can_be_given() -> None:
    features = ["user", "country", "item"]
    ebc = load_dlrm_checkpoint(saved_state(), operation="add", feature_names=features, num_embeddings=NUM_IDS)
    configs = ebc.embedding_bag_configs()
    assert [c.name for c in configs] == ["t_user", "t_country", "t_item"]
    assert [c.feature_names for c in configs] == [["user"], ["country"], ["item"]]
    assert [c.num_embeddings for c in configs] == list(NUM_IDS)


def test_a_model_without_the_flag_needs_no_operation() -> None:
    state = {"emb_l.0.weight": torch.randn(5, 3)}
    ebc = load_dlrm_checkpoint(state)
    assert torch.equal(materialize(ebc, "t_cat_0"), state["emb_l.0.weight"])


def test_columns_of_a_concatenation_follow_one_another() -> None:
    state = saved_state()
    ebc = load_dlrm_checkpoint(state, operation="concat")
    assert [c.embedding_dim for c in ebc.embedding_bag_configs()] == [2 * DIM, DIM, 2 * DIM]
    row = materialize(ebc, "t_cat_0", [102])[0]
    assert torch.equal(row, torch.cat([state["emb_l.0.weight_q"][25], state["emb_l.0.weight_r"][2]]))


def test_quotients_that_dlrm_rounds_are_named() -> None:
    """Its float32 quotient of id 16,777,219 is 4,194,305, and the quotient is 4,194,304."""
    big = {"emb_l.0.weight_q": torch.ones(1).expand(4_194_306, 4), "emb_l.0.weight_r": torch.ones(4, 4)}
    with pytest.warns(UserWarning, match=r"emb_l\.0: dlrm divides ids in float32, and some quotients above id 2\^24"):
        load_dlrm_checkpoint(big, operation="add")


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any], dict[str, Any]]] = {
    "no operation": (ValueError, r"emb_l\.0: is compressed, and operation is None; allowed: mult, add, concat", {}, {}),
    "another operation": (
        ValueError,
        r"operation='path'; allowed: mult, add, concat",
        {},
        {"operation": "path"},
    ),
    "names": (
        ValueError,
        r"feature_names: has 1 entries; allowed: 3, one for each table",
        {},
        {"operation": "add", "feature_names": ["f"]},
    ),
    "too few ids": (
        ValueError,
        r"emb_l\.0: num_embeddings=100; allowed: 101 to 104, by 26 quotients and 4 remainders",
        {},
        {"operation": "add", "num_embeddings": [100, 12, 40]},
    ),
    "too many ids": (
        ValueError,
        r"emb_l\.1: num_embeddings=13; allowed: 12, its rows",
        {},
        {"operation": "add", "num_embeddings": [101, 13, 40]},
    ),
    "half a table": (
        ValueError,
        r"emb_l\.3: the checkpoint has \['weight_q'\]; allowed: weight, or weight_q and weight_r",
        {"emb_l.3.weight_q": torch.ones(4, DIM)},
        {"operation": "add"},
    ),
    "a gap": (
        ValueError,
        r"the checkpoint has \['emb_l\.0', .*'emb_l\.4'\]; allowed: emb_l\.0, emb_l\.1 and so on, without gaps",
        {"emb_l.4.weight": torch.ones(4, DIM)},
        {"operation": "add"},
    ),
    "mixed dimensions": (
        NotImplementedError,
        r"emb_l\.3: --md-flag is not supported",
        {"emb_l.3.embs.weight": torch.ones(4, 2), "emb_l.3.proj.weight": torch.ones(DIM, 2)},
        {"operation": "add"},
    ),
    "weighted pooling": (
        NotImplementedError,
        r"'v_W_l\.0': --weighted-pooling=learned has a weight of each id",
        {"v_W_l.0": torch.ones(103)},
        {"operation": "add"},
    ),
    "another type": (
        ValueError,
        r"emb_l\.3\.weight: has shape \(4, 8\) and type torch\.float16; allowed: \(rows, D\) of torch\.float32",
        {"emb_l.3.weight": torch.ones(4, DIM).half()},
        {"operation": "add"},
    ),
    "other columns": (
        ValueError,
        r"emb_l\.3: has 8 and 4 columns; allowed: as many in both, or operation concat",
        {"emb_l.3.weight_q": torch.ones(4, DIM), "emb_l.3.weight_r": torch.ones(4, 4)},
        {"operation": "add"},
    ),
    "narrow rows": (
        ValueError,
        r"table 't_cat_3': embedding_dim=2; allowed: positive multiples of 4",
        {"emb_l.3.weight_q": torch.ones(4, 2), "emb_l.3.weight_r": torch.ones(4, 2)},
        {"operation": "add"},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    error, message, more, arguments = REFUSED[case]
    with pytest.raises(error, match=message):
        load_dlrm_checkpoint(saved_state() | more, **arguments)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the checkpoint has \['dense\.weight'\]; allowed: emb_l\.0"):
        load_dlrm_checkpoint({"dense.weight": torch.ones(2)})
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=r"tensor\.pt: holds a Tensor; allowed: the file of --save-model"):
        load_dlrm_checkpoint(tmp_path / "tensor.pt")
    torch.save({"state_dict": saved_state(), "model": torch.nn.Linear(2, 2)}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt: has more than tensors, numbers and strings"):
        load_dlrm_checkpoint(tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("emb_l.0.weight 1.0\n")
    with pytest.raises(ValueError, match=r"text\.pt: has more than tensors, .*, or is no file of PyTorch"):
        load_dlrm_checkpoint(tmp_path / "text.pt")
