"""``torchrec-qr plan``."""

import argparse
import sys
from pathlib import Path
from typing import cast, get_args

from torchrec.distributed.planner.types import PlannerError

from torchrec_qr.cli.schema import ConfigError
from torchrec_qr.cli.schema.planner_section import Device
from torchrec_qr.cli.sizing.least_compression import as_yaml, fit
from torchrec_qr.cli.sizing.plan_answer import Answer
from torchrec_qr.cli.sizing.plan_file import PlanFile, as_json
from torchrec_qr.cli.sizing.plan_report import as_text, by_device, compared
from torchrec_qr.cli.sizing.sized_job import VARIANTS, read_sizing


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code: 0 with a plan, 1 if none fits, 2 for what is wrong with the input."""
    try:
        return _run(arguments)
    except (ConfigError, ValueError, NotImplementedError, OSError, PlannerError) as error:
        print(f"torchrec-qr plan: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    devices = _devices(arguments.device)
    overrides = {
        "topology": arguments.topology,
        "device": devices[0] if devices else None,
        "hbm_gib": arguments.hbm_gib,
        "batch_size": arguments.batch_size,
    }
    sizing = read_sizing(arguments.config, overrides, arguments.optimizer)
    sizing = sizing.in_groups_of(arguments.sharding_group_size, arguments.inter_host_allreduce)
    variants = _choices("--compare", arguments.compare, VARIANTS)
    if arguments.fit:
        if len(devices) > 1:
            raise ValueError(f"--fit --device {arguments.device}; allowed: one device, because it prints one section")
        rows, fitted = fit(sizing)
        print(as_yaml(fitted, rows), end="")
        return 0
    answers = [Answer.of(sizing.on_device(name), variants) for name in devices] or [Answer.of(sizing, variants)]
    if arguments.json:
        _write(arguments.json, answers)
    if arguments.json != "-":
        _print(answers)
    failed = [answer for answer in answers if answer.failure is not None]
    for answer in failed:
        device = f"{answer.sizing.spec.device}: " if len(answers) > 1 else ""
        print(f"torchrec-qr plan: {device}{answer.failure}", file=sys.stderr)
    return 1 if failed else 0


def _devices(given: str | None) -> list[Device]:
    return [cast(Device, name) for name in dict.fromkeys(_choices("--device", given, get_args(Device)))]


def _choices(flag: str, given: str | None, allowed: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in given.split(",")] if given is not None else []
    wrong = [name for name in names if name not in allowed]
    if wrong:
        raise ValueError(f"{flag} {given}: {wrong[0]!r} is unknown; allowed: {', '.join(allowed)}")
    return names


def _print(answers: list[Answer]) -> None:
    sizing = answers[0].sizing
    spec = sizing.spec
    names = ", ".join(str(answer.sizing.spec.device) for answer in answers)
    memory = "the device's memory" if spec.hbm_gib is None else f"{spec.hbm_gib:g} GiB"
    print(f"{sizing.name}: {len(sizing.tables)} tables on {spec.topology} {names}")
    print(
        f"{memory}, {spec.storage_reserve:.0%} of it reserved; batch {spec.batch_size} a rank; "
        f"tables stepped by {sizing.optimizer}\n"
    )
    if len(answers) > 1:
        print(by_device(answers))
        for answer in answers if answers[0].compared else ():
            print(f"\n{answer.sizing.spec.device}\n{compared(answer.totals)}")
        return
    (answer,) = answers
    if answer.estimated is not None:
        print(as_text(answer.estimated, sizing.groups, sizing.sync(answer.estimated)), end="\n\n")
    print(compared(answer.totals))


def _write(path: str, answers: list[Answer]) -> None:
    text = as_json(PlanFile({str(answer.sizing.spec.device): answer.saved() for answer in answers}))
    if path == "-":
        print(text)
    else:
        Path(path).write_text(f"{text}\n")
