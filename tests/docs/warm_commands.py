"""Commands of this project that run in a process that has imported PyTorch: a start of their own takes seconds."""

import io
import runpy
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from unittest.mock import patch

_OF_THE_SHELL = set("$`<>|&;*?~(){}\n")


def is_warm(command: str) -> bool:
    """Returns whether `run_warm` can run a command: one of the two programs, with nothing that a shell replaces."""
    without_comment = command.partition("  #")[0]
    return command.startswith(("torchx run ", "torchrec-qr ")) and not _OF_THE_SHELL & set(without_comment)


def run_warm(command: str) -> tuple[int, str]:
    """Returns the exit code and the output of a command; that of TorchX stops before it submits a job."""
    from torchrec_qr.cli.commands import main

    program, *arguments = shlex.split(command, comments=True)
    if program == "torchrec-qr":
        return _outcome(lambda: main(arguments))
    from torchx.cli.argparse_util import ArgOnceAction, torchxconfig
    from torchx.cli.main import main as torchx

    # TorchX remembers the options of its process, which a command line has once.
    for action in (ArgOnceAction, torchxconfig):
        action.called_args.clear()
    return _outcome(lambda: torchx(["--log_level", "ERROR", "run", "--dryrun", *arguments[1:]]))


@cache
def help_of(module: str, *subcommand: str) -> str:
    """Returns what ``python -m MODULE SUBCOMMAND --help`` prints."""
    with patch.object(sys, "argv", [module, *subcommand, "--help"]):
        return _outcome(lambda: runpy.run_module(module, run_name="__main__"))[1]


def _outcome(call: Callable[[], object]) -> tuple[int, str]:
    output = io.StringIO()
    code: object = 0
    with redirect_stdout(output), redirect_stderr(output):
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code
    # A module and TorchX's main return no exit code.
    return code if isinstance(code, int) else int(isinstance(code, str)), output.getvalue()
