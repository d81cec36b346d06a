"""The harness of the pages refuses what is wrong in a block, and names its line."""

from pathlib import Path

import pytest
from commands_not_run import check
from fenced_blocks import ONE_RANK, Block, blocks_of
from shell_blocks import commands_of, reason_not_to_run, run_block
from yaml_blocks import load_block

from tests.diff_sides import one_side


def test_blocks_have_their_language_line_and_text() -> None:
    page = f"# A\n\n- item\n  ```python\n  x = 1\n  ```\n\n{ONE_RANK}\n````sh\n```\n````\n```{{note}}\n1\n```\n"
    assert blocks_of(page) == [Block("python", 5, "x = 1\n"), Block("sh", 10, "```\n", on_one_rank=True)]


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("a\n```cpp\n1\n```", "line 2: a block of 'cpp'; allowed: diff, python, sh, text, yaml"),
        ("```\n1\n```", "line 1: a block of ''"),
        ("```sh\n1", "line 1: the block has no end"),
    ],
)
def test_a_block_that_no_test_runs_is_refused(page: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        blocks_of(page)


def test_both_sides_of_a_diff_keep_their_lines() -> None:
    diff = " a = 1\n-b = 2\n+b = 3\n"
    assert (one_side(diff, "-"), one_side(diff, "+")) == ("a = 1\nb = 2\n\n", "a = 1\n\nb = 3\n")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("tables: [{name: a, num_embedings: 10, embedding_dim: 4}]", "did you mean 'num_embeddings'"),
        ("planer: {topology: 2x8}", "sections \\['planer'\\]; allowed: "),
        ("base: configs/none.yaml", "none.yaml"),
        (
            "tables: [{name: a, num_embeddings: 10, embedding_dim: 16}]\n"
            "data: {features: [b]}\nmodel: {bottom_mlp: [16]}",
            r"tables\[0\].feature_names",
        ),
    ],
)
def test_yaml_that_the_schema_refuses_fails(text: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        load_block(Block("yaml", 1, text), tmp_path)


def test_a_named_yaml_block_becomes_that_file(tmp_path: Path) -> None:
    block = Block("yaml", 1, "# job.yaml\nplanner: {topology: 2x8}\n")
    load_block(block, tmp_path)
    assert (tmp_path / "job.yaml").read_text() == block.text
    with pytest.raises(ValueError, match="is there already"):
        load_block(block, tmp_path)


def test_commands_of_a_block_are_joined_and_have_their_lines() -> None:
    block = Block("sh", 7, "# why\na --b \\\n    c  # d\n\nif e; then f; fi\n")
    assert [(command.line, command.text) for command in commands_of(block)] == [
        (8, "a --b c  # d"),
        (11, "if e; then f; fi"),
    ]


def test_a_command_that_fails_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="line 3: exit code 1"):
        run_block(Block("sh", 3, "false\ntrue\n"), tmp_path)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("make trian", "No rule to make target"),
        ("make train CONFIG=configs/none.yaml", "configs/none.yaml is not there"),
        ("python -m launch.nothing", "there is no module launch.nothing"),
        ("no-such-program --x", "no-such-program is no program of the environment"),
        ("sudo scripts/none.sh up", "scripts/none.sh is not there"),
    ],
)
def test_a_command_that_does_not_run_is_checked(command: str, error: str) -> None:
    assert error in "; ".join(check(command))


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python -m launch.train --confg configs/demo.yaml", "launch.train has no option --confg"),
        ("torchrun --nproc-per-host 2 -m launch.train --x", "torchrun refuses"),
    ],
)
def test_options_of_a_command_that_does_not_run_are_checked(command: str, error: str) -> None:
    assert error in "; ".join(check(command))


def test_a_command_that_is_right_has_no_errors() -> None:
    assert check("make train CONFIG=configs/demo.yaml RANKS=2  # or; this") == []
    assert reason_not_to_run("make train RANKS=2") is not None
    assert reason_not_to_run("torchrec-qr plan") is None
