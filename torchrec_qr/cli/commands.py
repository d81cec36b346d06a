"""The command ``torchrec-qr``. Help imports no torch, so that it is instant, and ``doctor`` runs if torch is broken."""

import argparse
from collections.abc import Sequence
from typing import Any

from torchrec_qr import __version__
from torchrec_qr.cli import doctor


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv (Sequence[str] | None): the arguments; default: those of the process.

    Raises:
        SystemExit: code 2 for arguments that do not parse, 0 after ``--help`` and ``--version``.

    Example:
        >>> from torchrec_qr.cli.commands import main
        >>> try:
        ...     main(["--version"])
        ... except SystemExit as stop:
        ...     print(stop.code)
        torchrec-qr ...
        0
    """
    parser = argparse.ArgumentParser(prog="torchrec-qr", description="Tools of torchrec_qr.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "doctor",
        help="tell whether the installed torch, FBGEMM and TorchRec fit together",
        description="Shows the versions of the stack, imports it, and says what to install where it does not fit. "
        "Exit code 0 if it fits, 1 if not.",
    )
    command.set_defaults(run=lambda _: doctor.run())
    _add_plan(commands)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


def _add_plan(commands: Any) -> None:
    command = commands.add_parser(
        "plan",
        help="place a model's tables on a cluster, without one",
        description="Reads the tables: and planner: sections of a job's YAML and prints where each table goes, what "
        "that costs every rank, and why. Exit code 0 if there is a plan, 1 if none fits, 2 for errors.",
    )
    command.add_argument("--config", required=True, metavar="FILE", help="of the job")
    command.add_argument("--topology", metavar="NxR", help="nodes x ranks per node; default: the config's")
    command.add_argument(
        "--device", metavar="NAME[,NAME]", help="cpu, a100, h100, h200, or several of them; default: the config's"
    )
    command.add_argument("--hbm-gib", type=float, metavar="GIB", help="memory of a rank; default: the device's")
    command.add_argument("--batch-size", type=int, metavar="B", help="of a rank; default: the config's")
    command.add_argument("--optimizer", help="of the tables; default: the config's, else sgd")
    command.add_argument(
        "--sharding-group-size", type=int, metavar="N", help="plan for groups of N ranks, as DMPCollection has them"
    )
    command.add_argument(
        "--inter-host-allreduce",
        action="store_true",
        help="a group has consecutive ranks, in place of its copies",
    )
    command.add_argument(
        "--json", metavar="FILE", help="write the plan for programs, and for planner.plan_file; - for standard output"
    )
    command.add_argument("--compare", metavar="full,hash,qr", help="the same tables uncompressed, hashed, composed")
    command.add_argument("--fit", action="store_true", help="print the tables: section of least compression that fits")
    command.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from torchrec_qr.cli.sizing.plan_command import run

    return run(arguments)
