"""The command ``torchrec-qr``. Imports no torch, so that help is instant and ``doctor`` runs where torch cannot."""

import argparse
from collections.abc import Sequence

from torchrec_qr import __version__, doctor


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv: the arguments; default: those of the process.

    Raises:
        SystemExit: code 2 for arguments that do not parse, 0 after ``--help`` and ``--version``.

    Example:
        >>> from torchrec_qr.cli import main
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
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
