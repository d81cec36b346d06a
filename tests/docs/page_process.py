"""Runs all blocks of a page in order, in the process of a rank."""

import linecache
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from fenced_blocks import Block, blocks_of
from shell_blocks import make_checkout, run_block
from yaml_blocks import load_block

from tests.diff_sides import one_side

# A Python block whose first line names a file becomes this file, for the commands that follow.
_SCRIPT = re.compile(r"# (?P<name>[\w/]+\.py)$", re.MULTILINE)
SETUPS = Path(__file__).parent / "setups"


def run_page(rank: int, world_size: int, page: str, name: str, folder: str) -> int:
    """Runs the blocks of the file ``page`` in the folder, and returns their number.

    Python blocks share the namespace of one module, with ``setups/before_<name>.py`` before the first. On several
    ranks each of them runs them, and rank 0 alone the other languages. A block whose first line is ``# NAME.py`` is
    written to that file instead.
    """
    os.chdir(folder)
    if rank == 0:
        make_checkout(Path(folder))
    dist.barrier()
    module = ModuleType("page")
    # A class of the page is found by its module's name, by pickle for one.
    sys.modules["page"] = module
    module.__dict__.update(torch=torch, device=torch.device("cpu"))
    setup = SETUPS / f"before_{name}.py"
    if setup.exists():
        exec(compile(setup.read_text(), str(setup), "exec"), module.__dict__)
    commands = SETUPS / f"before_{name}.sh"
    before = commands.read_text() if commands.exists() else ""
    blocks = blocks_of(Path(page).read_text())
    for block in blocks:
        if rank == 0 or not (block.on_one_rank or block.language in ("sh", "yaml")):
            _run(block, page, module, Path(folder), before)
        dist.barrier()
    return len(blocks)


def _run(block: Block, page: str, module: ModuleType, folder: Path, commands_before: str) -> None:
    if named := _SCRIPT.match(block.text):
        (folder / named["name"]).write_text(block.text)
    elif block.language == "python":
        _run_python(block.text, block.line, page, module)
    elif block.language == "diff":
        for side in "-+":
            _run_python(one_side(block.text, side), block.line, page, module)
    elif block.language == "yaml":
        load_block(block, folder)
    elif block.language == "sh":
        run_block(block, folder, commands_before)


def _run_python(text: str, line: int, page: str, module: ModuleType) -> None:
    linecache.checkcache(page)
    exec(compile("\n" * (line - 1) + text, page, "exec"), module.__dict__)
