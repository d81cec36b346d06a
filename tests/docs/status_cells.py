"""The cells of docs/status.md for unsharded tables: each is found by running it on tiny tables of ids 0 to 99.

A cell holds for two tables, one of which hashes its ids, and for bags and sequences.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from batches import Bags, batch
from cases import oracle_of, randomize
from kinds import Kind, kind_of
from oracle import OracleTable
from single_tables import collection_of, table_of
from small_collections import S
from torch import Tensor
from torch.export import Dim
from torchrec.fx import symbolic_trace

from tests.inference.exported_models import Model
from tests.inference.quantised_tables import DTYPES, values_of
from torchrec_qr import MixedRadix
from torchrec_qr.inference import quantize_embeddings
from torchrec_qr.quant.row_storage import read_stored

YES, PYTORCH, REFUSED = "yes", "PyTorch", "refused"
FIVE = [3, 3, 3, 2, 2]
KINDS = {
    "quotient_remainder, strided": kind_of("strided", 2),
    "quotient_remainder, adjacent": kind_of("adjacent", 2),
    "mixed_radix": kind_of("mixed_radix", 3),
    "mixed_radix, five partitions": Kind("five", MixedRadix(sizes=FIVE), S, oracle.mixed_radix(FIVE)),
    "chinese_remainder": kind_of("chinese_remainder", 3),
    "explicit": kind_of("explicit", 2),
    "hash": kind_of("hash", 1),
}
OPERATIONS = ("mult", "add", "concat", "path")
SEED = 3
FEATURES = ("f_given", "f_hashed")
BATCHES: list[dict[str, Bags]] = [
    {"f_given": [[0, 5, 99], [], [7]], "f_hashed": [[-3, 2**40], [99], [5, 5]]},
    {"f_given": [[13], [98, 13, 13, 4], [50], [51, 1]], "f_hashed": [[], [3], [-(2**63), 0, 1], [8]]},
]


def tables(kind: Kind, operation: str, pooled: bool, suffix: str = "") -> list[Any]:
    """A table of given ids and one of hashed ids, whose features have their names."""
    fields = {"num_embeddings": S, "embedding_dim": 20, "operation": operation}
    hashed = {"id_hash": "splitmix64", "hash_seed": SEED}
    return [
        table_of(kind.partitions, pooled, name=f"given{suffix}", **fields),
        table_of(kind.partitions, pooled, name=f"hashed{suffix}", **fields, **hashed),
    ]


def collection(kind: Kind, operation: str, pooled: bool) -> Any:
    module = collection_of(tables(kind, operation, pooled))
    randomize(module, 0)
    return module


def tables_in(module: Any) -> list[Any]:
    return list((module.embedding_bags if hasattr(module, "embedding_bags") else module.embeddings).values())


def oracles(module: Any, kind: Kind) -> list[OracleTable]:
    of_ids = (kind, kind.hashed(SEED))
    return [oracle_of(t.config, k, t) for t, k in zip(tables_in(module), of_ids, strict=True)]


def expected(reference: Sequence[OracleTable], per_feature: dict[str, Bags], pooled: bool) -> Tensor:
    """The values that `values_of` returns of an output, in float64."""
    bags = list(zip(reference, per_feature.values(), strict=True))
    if pooled:
        return torch.cat([table.pool(of) for table, of in bags], dim=1).flatten()
    return torch.cat([table.embed(x) for table, of in bags for bag in of for x in bag])


def assert_values(actual: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(actual.double(), exact, rtol=2e-5, atol=2e-5)


def trained(kind: Kind, operation: str, pooled: bool) -> str:
    """Trains a step of SGD, and compares output and rows with the oracle's."""
    module = collection(kind, operation, pooled)
    reference = oracles(module, kind)
    out, exact = values_of(module(batch(BATCHES[0]))), expected(reference, BATCHES[0], pooled)
    assert_values(out, exact)
    stored = [w for table in tables_in(module) for w in table.weights()]
    weights = [w for table in reference for w in table.weights]
    for total, own in (((out * coefficients(out)).sum(), stored), ((exact * coefficients(exact)).sum(), weights)):
        for w, gradient in zip(own, torch.autograd.grad(total, own), strict=True):
            w.data -= 0.1 * gradient
    for w, exactly in zip(stored, weights, strict=True):
        assert_values(w.detach(), exactly.detach())
    return YES if all(table.layout.has_kernels for table in tables_in(module)) else PYTORCH


def coefficients(out: Tensor) -> Tensor:
    """1, 1.1, 1.2, …, so that a permutation shows."""
    return 1 + torch.arange(out.numel(), dtype=out.dtype) / 10


def served(dtype: torch.dtype, kind: Kind, operation: str, pooled: bool) -> str:
    """Quantises, and compares the output with the oracle of the values that the stored rows stand for."""
    module = collection(kind, operation, pooled)
    reference, quantised = oracles(module, kind), quantize_embeddings(module, dtype)
    for table, rows in zip(reference, tables_in(quantised), strict=True):
        of_floats = table.weights
        table.weights = [
            read_stored(w, width, DTYPES[dtype]).double()
            for w, width in zip(rows.weights(), rows.layout.widths, strict=True)
        ]
        assert all(w.dtype == torch.uint8 for w in rows.weights())
        assert not torch.equal(table.weights[0], of_floats[0])
    for per_feature in BATCHES:
        assert_values(values_of(quantised(batch(per_feature))), expected(reference, per_feature, pooled))
    return YES if all(table.is_served for table in tables_in(quantised)) else PYTORCH


def served_forms(module: Any) -> list[Any]:
    """The collection, and its rows in fp32 and in 8 bits, which one operator looks up."""
    return [module, *(quantize_embeddings(module, dtype) for dtype in (torch.float32, torch.qint8))]


def tensors(per_feature: dict[str, Bags]) -> tuple[Tensor, Tensor]:
    """The ids (N,) and the lengths (F, B) of a batch."""
    features = batch(per_feature)
    return features.values(), features.lengths().view(len(per_feature), -1)


def exported(kind: Kind, operation: str, pooled: bool) -> str:
    """Exports with dynamic numbers of bags and ids; the program has the bits of the operator."""
    floats, in_fp32, in_8_bits = served_forms(collection(kind, operation, pooled))
    marks = []
    for module, peer in ((floats, in_fp32), (in_8_bits, in_8_bits)):
        try:
            with torch.no_grad():
                program = torch.export.export(
                    Model(module, FEATURES).eval(),
                    tensors(BATCHES[0]),
                    dynamic_shapes=({0: Dim.DYNAMIC}, {1: Dim.DYNAMIC}),
                    strict=False,
                )
        except NotImplementedError as error:
            marks.append(refusal(error, operation))
            continue
        for per_feature in BATCHES:
            out, same = program.module()(*tensors(per_feature)), Model(peer, FEATURES)(*tensors(per_feature))
            assert all(torch.equal(a, b) for a, b in zip(out, same, strict=True))
        marks.append(YES)
    return only(marks)


def scripted(kind: Kind, operation: str, pooled: bool) -> str:
    """Scripts the collection, and a trace of its quantised form; both have the bits of the operator."""
    floats, in_fp32, in_8_bits = served_forms(collection(kind, operation, pooled))
    marks = []
    for make, module, peer in ((lambda m: m, floats, in_fp32), (symbolic_trace, in_8_bits, in_8_bits)):
        try:
            script = torch.jit.script(make(module))
            outs = [values_of(script(batch(per_feature))) for per_feature in BATCHES]
        except (NotImplementedError, torch.jit.Error) as error:
            marks.append(refusal(error, operation))
            continue
        for out, per_feature in zip(outs, BATCHES, strict=True):
            assert torch.equal(out, values_of(peer(batch(per_feature))))
        marks.append(YES)
    return only(marks)


def refusal(error: Exception, operation: str) -> str:
    """Checks that an error names the table and the operation."""
    assert f"table 'given': operation '{operation}' with" in str(error), error
    return REFUSED


def only(marks: Sequence[str]) -> str:
    (mark,) = set(marks)
    return mark


COLUMNS: dict[str, Callable[[Kind, str, bool], str]] = {
    "CPU training": trained,
    "int8": partial(served, torch.qint8),
    "int4": partial(served, torch.quint4x2),
    "torch.export": exported,
    "TorchScript": scripted,
}


def mark_of(column: str, kind: str, operation: str) -> str:
    """Runs a cell for bags and for sequences, and returns what it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCHREC_QR_CPU_KERNELS", raising=False)
        return only([COLUMNS[column](KINDS[kind], operation, pooled) for pooled in (True, False)])
