"""Every block of every page runs, or is checked as its language asks: see `tests/docs/fenced_blocks.py`."""

from pathlib import Path

import pytest
from commands_not_run import NOT_RUN
from fenced_blocks import blocks_of, pages
from page_process import run_page
from shell_blocks import commands_of

from tests.distributed.ranks import run_ranks

# The ranks, and those of a node, of pages whose blocks need more than one.
RANKS = {"checkpoints": (2, 2), "compatibility": (4, 2), "per_node": (4, 2)}
# Allow what a page takes where other work has the machine.
SECONDS = 280
# Pages of which a test of its own runs every command, jobs included, and compares what they print.
OWN_TEST = {"own_data"}  # test_own_data_page.py


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in pages() if name not in OWN_TEST])
def test_blocks_of_a_page_run(name: str, tmp_path: Path) -> None:
    page = pages()[name]
    if not blocks_of(page.read_text()):
        return
    ranks, of_a_node = RANKS.get(name, (1, 1))
    arguments = (str(page), name, str(tmp_path))
    counts = run_ranks(run_page, ranks, *arguments, local_world_size=of_a_node, timeout=SECONDS, alone=True)
    assert counts == [len(blocks_of(page.read_text()))] * ranks


def test_no_entry_of_the_list_is_stale() -> None:
    """Each entry is the reason of some command of some page."""
    commands = [
        command.text
        for page in pages().values()
        for block in blocks_of(page.read_text(), any_language=True)
        if block.language == "sh"
        for command in commands_of(block)
    ]
    assert [entry for entry in NOT_RUN if not any(command.startswith(entry) for command in commands)] == []
