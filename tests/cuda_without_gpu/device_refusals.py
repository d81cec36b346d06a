"""Calls with tensors on several devices, each of which must be refused by a ValueError that names the tensor."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, ExplicitPartitions
from torchrec_qr.ops.arguments import Batch, DenseGradient, Outcome
from torchrec_qr.ops.backends import triton
from torchrec_qr.ops.description import Description, TableLayout
from torchrec_qr.ops.lookup import look_up
from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.ops.update_rules import Adagrad, Update

HERE, OTHER, HOST = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
SPEC = ExplicitPartitions(((0, 1, 2, 0, 1, 2), (0, 0, 0, 1, 1, 1)))
PARTITIONS = SPEC.bind(6)
MAPPED = TableLayout("mult", partition_layouts(PARTITIONS, {0: 4, 1: 4}), num_ids=6)


def _batch(ids: torch.device = HERE, offsets: torch.device = HERE, weights: torch.device = HERE) -> Batch:
    return Batch(
        torch.zeros(3, dtype=torch.int64, device=ids),
        torch.zeros(3, dtype=torch.int64, device=offsets),
        torch.ones(3, device=weights),
        True,
    )


def _weights(second: torch.device = HERE) -> list[Tensor]:
    return [torch.zeros(3, 4, device=HERE), torch.zeros(2, 4, device=second)]


def _class_map(device: torch.device = HERE) -> Tensor:
    return torch.zeros(2, 6, dtype=torch.int32, device=device)


def _tables(class_map: torch.device = HERE) -> Description:
    return Description([MAPPED], ["t"], [_class_map(class_map)])


def _update(state: torch.device, rows: int = 3) -> Update:
    return Update(Adagrad(), {"momentum1": torch.zeros(rows, 4, device=state)}, 0.1)


def _look_up(batch: Batch, second: torch.device = HERE, class_map: torch.device = HERE) -> None:
    look_up(_tables(class_map), _weights(second), batch)


def _backward(
    gradient: torch.device = HERE,
    state: torch.device = HERE,
    touched: torch.device = HERE,
    class_map: torch.device = HERE,
) -> None:
    second: Outcome = _update(state, rows=2)
    if touched != HERE:
        second = DenseGradient(torch.zeros(2, dtype=torch.uint8, device=touched))
    out_gradient = torch.zeros(2, 4, device=gradient)
    triton.backward(_tables(class_map), _weights(), _batch(), out_gradient, [_update(HERE), second], False)


def _update_rows(rows: torch.device = HERE, gradients: torch.device = HERE, state: torch.device = HERE) -> None:
    weight = torch.zeros(3, 4, device=HERE)
    of_rows = torch.zeros(2, dtype=torch.int64, device=rows)
    triton.update_rows(weight, of_rows, torch.zeros(2, 4, device=gradients), _update(state))


def _collection(features: torch.device = HERE, move: str = "", to: torch.device = HOST) -> None:
    config = CompositionalEmbeddingBagConfig(
        name="t", feature_names=["f"], num_embeddings=6, embedding_dim=4, partitions=SPEC
    )
    collection = CompositionalEmbeddingBagCollection([config], device=HERE)
    table = collection.embedding_bags["t"]
    if move == "partition":
        table.partition_1.weight = nn.Parameter(torch.zeros(2, 4, device=to))
    if move == "class map":
        table.class_map = _class_map(to)
    ids = torch.zeros(2, dtype=torch.int64, device=features)
    lengths = torch.ones(2, dtype=torch.int64, device=features)
    collection(KeyedJaggedTensor(keys=["f"], values=ids, lengths=lengths))


# The calls of `device_cases.REFUSED`.
CALLS: dict[str, Callable[[], None]] = {
    "operator: ids on another device": lambda: _look_up(_batch(ids=OTHER)),
    "operator: ids on the host": lambda: _look_up(_batch(ids=HOST)),
    "operator: offsets on another device": lambda: _look_up(_batch(offsets=OTHER)),
    "operator: weights of ids": lambda: _look_up(_batch(weights=HOST)),
    "operator: a partition": lambda: _look_up(_batch(), second=OTHER),
    "operator: a class map on the host": lambda: _look_up(_batch(), class_map=HOST),
    "step: a gradient": lambda: _backward(gradient=OTHER),
    "step: a state on the host": lambda: _backward(state=HOST),
    "step: touched rows": lambda: _backward(touched=OTHER),
    "step: a class map": lambda: _backward(class_map=OTHER),
    "rows: their numbers": lambda: _update_rows(rows=HOST),
    "rows: their gradients": lambda: _update_rows(gradients=OTHER),
    "rows: a state": lambda: _update_rows(state=OTHER),
    "collection: features on the host": lambda: _collection(features=HOST),
    "collection: features on another device": lambda: _collection(features=OTHER),
    "collection: a partition on the host": lambda: _collection(move="partition"),
    "collection: a class map on another device": lambda: _collection(move="class map", to=OTHER),
}
