"""``torchrec-qr plan``."""

import argparse
import json
import sys
from pathlib import Path

from torchrec.distributed.planner.types import PlannerError, PlannerErrorType

from torchrec_qr.cli.schema import ConfigError
from torchrec_qr.cli.sizing.least_compression import as_yaml, fit
from torchrec_qr.cli.sizing.plan_report import Totals, as_json, as_text, compared
from torchrec_qr.cli.sizing.sized_job import VARIANTS, Sizing, Tables, read_sizing
from torchrec_qr.configs import stored_bytes, stored_shapes
from torchrec_qr.planner import EstimatedPlan


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code: 0 with a plan, 1 if none fits, 2 for what is wrong with the input."""
    try:
        return _run(arguments)
    except (ConfigError, ValueError, NotImplementedError, OSError) as error:
        print(f"torchrec-qr plan: {error}", file=sys.stderr)
        return 2
    except PlannerError as error:
        print(f"torchrec-qr plan: {error}", file=sys.stderr)
        return 1 if error.error_type == PlannerErrorType.INSUFFICIENT_STORAGE else 2


def _run(arguments: argparse.Namespace) -> int:
    overrides = {
        "topology": arguments.topology,
        "device": arguments.device,
        "hbm_gib": arguments.hbm_gib,
        "batch_size": arguments.batch_size,
    }
    sizing = read_sizing(arguments.config, overrides, arguments.optimizer)
    variants = _variants(arguments.compare)
    if arguments.fit:
        rows, fitted = fit(sizing)
        print(as_yaml(fitted, rows), end="")
        return 0
    estimated, failure = _estimated(sizing)
    found = {"as given": _totals("as given", sizing, estimated)}
    for name in variants or ["full"]:
        variant = sizing.variant(name)
        found[name] = _totals(name, variant, _estimated(variant)[0])
    if arguments.json:
        _write(arguments.json, sizing, estimated, [found[name] for name in variants], failure)
    if arguments.json != "-":
        _print(sizing, estimated, list(found.values()))
    if failure is not None:
        raise failure
    return 0


def _variants(given: str | None) -> list[str]:
    names = [name.strip() for name in given.split(",")] if given is not None else []
    wrong = [name for name in names if name not in VARIANTS]
    if wrong:
        raise ValueError(f"--compare {given}: {wrong[0]!r} is unknown; allowed: {', '.join(VARIANTS)}")
    return names


def _estimated(sizing: Sizing) -> tuple[EstimatedPlan | None, PlannerError | None]:
    try:
        return sizing.plan(), None
    except PlannerError as error:
        if error.error_type != PlannerErrorType.INSUFFICIENT_STORAGE:
            raise
        return None, error


def _totals(name: str, sizing: Sizing, estimated: EstimatedPlan | None) -> Totals:
    return Totals(
        name=name,
        parameters=_parameters(sizing.tables),
        bytes_stored=_bytes(sizing.tables),
        bytes_held=None if estimated is None else max(estimated.ranks.memory),
        step_ms=None if estimated is None else estimated.step_ms,
        balance=None if estimated is None else estimated.ranks.balance,
        fewest_ranks=sizing.fewest_ranks(),
    )


def _print(sizing: Sizing, estimated: EstimatedPlan | None, totals: list[Totals]) -> None:
    spec = sizing.spec
    memory = "the device's memory" if spec.hbm_gib is None else f"{spec.hbm_gib:g} GiB"
    print(f"{sizing.name}: {len(sizing.tables)} tables on {spec.topology} {spec.device}")
    print(
        f"{memory}, {spec.storage_reserve:.0%} of it reserved; batch {spec.batch_size} a rank; "
        f"tables stepped by {sizing.optimizer}\n"
    )
    if estimated is not None:
        print(as_text(estimated), end="\n\n")
    print(compared(totals))


def _write(
    path: str, sizing: Sizing, estimated: EstimatedPlan | None, variants: list[Totals], failure: PlannerError | None
) -> None:
    assert sizing.spec.world_size is not None
    full = _bytes(sizing.variant("full").tables)
    out = as_json(estimated, sizing.spec.world_size, full, _bytes(sizing.tables))
    if failure is not None:
        out["error"] = str(failure)
    if variants:
        out["compare"] = {
            t.name: {"bytes": t.bytes_stored, "feasible": t.bytes_held is not None, "fewest_ranks": t.fewest_ranks}
            for t in variants
        }
    text = json.dumps(out, indent=1)
    if path == "-":
        print(text)
    else:
        Path(path).write_text(f"{text}\n")


def _parameters(tables: Tables) -> int:
    return sum(rows * columns for table in tables for rows, columns, _ in stored_shapes(table))


def _bytes(tables: Tables) -> int:
    return sum(stored_bytes(table) for table in tables)
