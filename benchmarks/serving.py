"""Latency and bytes of quantised tables on a CPU, against TorchRec's: ``python -m benchmarks.serving --json FILE``.

Rows are int8, of 64 columns. A call takes a batch whose KeyedJaggedTensor is new, and gives its pooled rows. All take
turns in one run, of eight calls on other batches each, because a process that serves has one model in its caches:

- ``full``: TorchRec's quantised ``EmbeddingBagCollection`` of tables of S rows;
- ``fbgemm``: FBGEMM's lookup within that collection alone, with ids and offsets that are prepared;
- ``qr_sqrt`` and ``qr_4``: our quantised collection with m = ⌈√S⌉ and m = 4;
- ``hashed_sqrt`` and ``hashed_4``: TorchRec's of tables of as many rows as ours store. Their ids come hashed.

``to_full`` and ``to_fbgemm`` are ratios of the p50, the least and the largest of five parts of the run beside them. A
call is compared with plain sums over ids before it is timed. Stored bytes are random, because no time depends on them.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection

from benchmarks.machine import about
from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.inference import quantize_embeddings
from torchrec_qr.ops.serving_reference import dequantised_rows

DIM = 64
PARTS = 5
CALLS_OF_TURN = 8
# Batches of a cell have so many ids together, at most, so that the caches do not hold the rows of all.
IDS_OF_CELL = 4_000_000


class Cell(NamedTuple):
    """The tables, their rows, the batch and the threads of one measurement."""

    tables: int
    rows: int
    batch: int
    hot: int
    threads: int
    ids: str


def main(argv: Sequence[str] | None = None) -> None:
    """Prints, and writes, a row per cell."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__)
    parser.add_argument("--json", type=Path, help="writes the rows to this file")
    parser.add_argument("--sets", nargs="+", default=["8x10000000", "26x2000000"], help="tables x rows of each")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 256, 4096])
    parser.add_argument("--hot", nargs="+", type=int, default=[1, 10], help="ids of a bag")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ids", nargs="+", choices=("uniform", "log_uniform"), default=["uniform"])
    parser.add_argument("--seconds", type=float, default=8.0, help="of the timed calls of a cell, at least")
    parser.add_argument("--quick", action="store_true", help="small tables and few calls: no figures")
    options = parser.parse_args(argv)
    if options.quick:
        options.sets, options.batches, options.seconds = ["3x10000"], [1, 16], 0.05
    before = torch.get_num_threads()
    rows = []
    for tables, num_ids in ([int(n) for n in text.split("x")] for text in options.sets):
        served = served_tables(tables, num_ids)
        for batch, hot, threads, ids in itertools.product(options.batches, options.hot, options.threads, options.ids):
            cell = Cell(tables, num_ids, batch, hot, threads, ids)
            torch.set_num_threads(threads)
            rows.append(measure(cell, served, options.seconds))
            show(rows[-1])
        del served
    torch.set_num_threads(before)
    if options.json:
        options.json.write_text(json.dumps({**about(), "dim": DIM, "row_type": "int8", "rows": rows}, indent=1) + "\n")


class Served(NamedTuple):
    """A collection that is measured. Ids of a batch are taken modulo ``rows``."""

    module: nn.Module
    rows: int
    num_bytes: int
    rows_of: Callable[[int, Tensor], Tensor]  # (N, D) fp32 of ids of a table


def served_tables(tables: int, num_ids: int) -> dict[str, Served]:
    """Returns the collections by name, ``full`` first."""
    found = {"full": full_tables(tables, num_ids)}
    for name, m in (("sqrt", math.isqrt(num_ids - 1) + 1), ("4", 4)):
        found[f"qr_{name}"] = compositional_tables(tables, num_ids, m)
        found[f"hashed_{name}"] = full_tables(tables, m + -(-num_ids // m))
    return found


def full_tables(tables: int, num_rows: int) -> Served:
    """Returns TorchRec's quantised collection, whose rows have scale and bias first and end in padding."""
    configs = [
        EmbeddingBagConfig(
            name=f"t{t}",
            feature_names=[f"f{t}"],
            num_embeddings=num_rows,
            embedding_dim=DIM,
            data_type=DataType.INT8,
        )
        for t in range(tables)
    ]
    module = QuantEmbeddingBagCollection(configs, is_weighted=False, device=torch.device("cpu"))
    weights = [module.get_buffer(f"embedding_bags.t{t}.weight") for t in range(tables)]
    for weight in weights:
        fill(weight, 0)

    def rows_of(t: int, ids: Tensor) -> Tensor:
        found = weights[t][ids]
        return dequantised_rows(torch.cat([found[:, 4 : 4 + DIM], found[:, :4]], dim=1), DIM, 8)

    return Served(module, num_rows, stored_bytes(module), rows_of)


def compositional_tables(tables: int, num_ids: int, m: int) -> Served:
    """Returns our quantised collection, whose rows have scale and bias last."""
    configs = [
        CompositionalEmbeddingBagConfig(
            name=f"t{t}",
            feature_names=[f"f{t}"],
            num_embeddings=num_ids,
            embedding_dim=DIM,
            partitions=QuotientRemainder(num_collisions=m),
        )
        for t in range(tables)
    ]
    floats = CompositionalEmbeddingBagCollection(tables=list(configs), device=torch.device("meta"))
    module = quantize_embeddings(floats, torch.qint8).to_empty(device="cpu")
    bound = configs[0].bound_partitions
    weights = [
        [module.get_buffer(f"embedding_bags.t{t}.partition_{j}.weight") for j in range(2)] for t in range(tables)
    ]
    for weight in itertools.chain(*weights):
        fill(weight, DIM)

    def rows_of(t: int, ids: Tensor) -> Tensor:
        rows = bound.rows(ids)
        first, second = (dequantised_rows(w[rows[:, j]], DIM, 8) for j, w in enumerate(weights[t]))
        return first * second

    return Served(module, num_ids, stored_bytes(module), rows_of)


def fill(weight: Tensor, affine: int) -> None:
    """Fills rows with random bytes, but a scale and a bias from byte ``affine`` on."""
    weight.random_(0, 256)
    weight[:, affine : affine + 4] = torch.tensor([2**-7, -1.0], dtype=torch.float16).view(torch.uint8)


def stored_bytes(module: nn.Module) -> int:
    """Returns the bytes of all buffers, those that share memory once."""
    storages = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in module.buffers()}
    return sum(storages.values())


class Batches:
    """Batches of a cell: each call takes the next."""

    def __init__(self, cell: Cell, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.keys = [f"f{t}" for t in range(cell.tables)]
        num_ids = cell.tables * cell.batch * cell.hot
        count = max(4, min(1000, IDS_OF_CELL // num_ids))
        self.ids = torch.empty(count, num_ids, dtype=torch.int64)
        for ids in self.ids:
            if cell.ids == "uniform":
                ids.random_(0, cell.rows, generator=generator)
            else:
                ids.copy_((torch.rand(num_ids, generator=generator) * math.log(cell.rows)).exp()).clamp_(
                    max=cell.rows - 1
                )
        self.ids %= rows
        self.lengths = torch.full((cell.tables * cell.batch,), cell.hot)
        self.offsets = torch.arange(0, num_ids + 1, cell.hot)
        self._next = 0

    def next_ids(self) -> Tensor:
        """Returns (F·B·L,) ids."""
        self._next = (self._next + 1) % len(self.ids)
        return self.ids[self._next]

    def features(self, ids: Tensor) -> KeyedJaggedTensor:
        """Returns a batch, none of whose derived fields have been computed."""
        return KeyedJaggedTensor(self.keys, ids, lengths=self.lengths)


def calls_of(cell: Cell, served: dict[str, Served]) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Returns what prepares a call, by name. The call alone is timed."""
    batches = {name: Batches(cell, of.rows) for name, of in served.items()}
    (lookup,) = cast(QuantEmbeddingBagCollection, served["full"].module)._emb_modules

    def module_call(name: str) -> Callable[[], Tensor]:
        features = batches[name].features(batches[name].next_ids())
        module = served[name].module
        return lambda: cast(Tensor, module(features).values())

    def bare_call() -> Callable[[], Tensor]:
        ids, offsets = batches["full"].next_ids(), batches["full"].offsets
        return lambda: cast(Tensor, lookup.forward(ids, offsets))

    return {"fbgemm": bare_call, **{name: partial(module_call, name) for name in served}}


class _OperatorCalls(TorchDispatchMode):
    """Counts calls of operators that look tables up."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "torchrec_qr_serving" or "lookup_function" in func.name()
        return func(*args, **(kwargs or {}))


def check(cell: Cell, name: str, served: Served) -> int:
    """Compares a batch with plain sums over ids. Returns how many lookups a call of the collection takes.

    Raises:
        RuntimeError: the values differ.
    """
    batches = Batches(cell._replace(batch=min(cell.batch, 16)), served.rows)
    ids = batches.next_ids()
    with torch.inference_mode(), _OperatorCalls() as operators:
        out = served.module(batches.features(ids)).values()
    of_tables = ids.view(cell.tables, -1)
    expected = [served.rows_of(t, of_tables[t]).view(-1, cell.hot, DIM).sum(1) for t in range(cell.tables)]
    if not torch.allclose(out, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4):
        raise RuntimeError(f"{name}, {cell}: the values differ from plain sums over ids")
    return operators.count


def measure(cell: Cell, served: dict[str, Served], seconds: float) -> dict[str, Any]:
    """Returns p50 and p99 of each call, bytes, and ratios to the full tables and to FBGEMM's lookup of them."""
    lookups = {name: check(cell, name, of) for name, of in served.items()}
    prepared = calls_of(cell, served)
    times: dict[str, list[float]] = {name: [] for name in prepared}
    names = list(prepared)
    start = time.perf_counter()
    with torch.inference_mode():
        for number in range(-1, 100_000):
            for name in [turn for turn in rotated(names, number) for _ in range(CALLS_OF_TURN)]:
                call = prepared[name]()
                begin = time.perf_counter()
                call()
                if number >= 0:
                    times[name].append(time.perf_counter() - begin)
            if number > PARTS and time.perf_counter() - start > seconds:
                break
    row: dict[str, Any] = {**cell._asdict(), "calls": len(times["full"]), "load": round(os.getloadavg()[0], 1)}
    for name, of_name in times.items():
        row[name] = {
            "p50_us": round(1e6 * statistics.median(of_name), 1),
            "p99_us": round(1e6 * statistics.quantiles(of_name, n=100)[98], 1),
            **ratios("full", of_name, times["full"]),
            **ratios("fbgemm", of_name, times["fbgemm"]),
        }
        if name in served:
            row[name] |= {"bytes": served[name].num_bytes, "lookups": lookups[name]}
            row[name]["bytes_to_full"] = round(served[name].num_bytes / served["full"].num_bytes, 6)
    return row


def rotated(names: list[str], number: int) -> Iterator[str]:
    """Yields the names, in an order that starts with another each time."""
    for i in range(len(names)):
        yield names[(number + i) % len(names)]


def ratios(name: str, times: list[float], base: list[float]) -> dict[str, Any]:
    """Returns the ratio of two medians, and the least and largest of it over parts of the run."""
    size = len(times) // PARTS
    parts = [
        statistics.median(times[i : i + size]) / statistics.median(base[i : i + size])
        for i in range(0, size * PARTS, size)
    ]
    ratio = statistics.median(times) / statistics.median(base)
    return {f"to_{name}": round(ratio, 3), f"to_{name}_spread": [round(min(parts), 3), round(max(parts), 3)]}


def show(row: dict[str, Any]) -> None:
    """Prints a row."""
    cell = Cell(*(row[field] for field in Cell._fields))
    print(f"{cell}, {row['calls']} calls of each, load {row['load']}")
    for name, of in row.items():
        if isinstance(of, dict):
            least, largest = of["to_full_spread"]
            print(
                f"  {name:12} p50 {of['p50_us']:9.1f} µs, p99 {of['p99_us']:9.1f}; to full {of['to_full']:5.2f} "
                f"[{least:.2f}, {largest:.2f}], to fbgemm {of['to_fbgemm']:5.2f}; "
                f"{of.get('bytes', 0) / 1e6:8.1f} MB"
            )


if __name__ == "__main__":
    main()
