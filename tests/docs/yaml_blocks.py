"""A YAML block of a page is a job, or sections of one, and the schema loads it."""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

from fenced_blocks import Block

from launch.config import Job, read_job
from torchrec_qr.cli.schema import load, read_yaml

_FILE = re.compile(r"# (?P<name>[\w./-]+\.yaml)$", re.MULTILINE)


def load_block(block: Block, folder: Path) -> None:
    """Loads a block: a whole job if it has a base, or tables and data; else each of its sections alone.

    A block whose first line is ``# NAME.yaml`` also becomes this file, for the commands that follow. Its base is
    relative to that file.
    """
    named = _FILE.match(block.text)
    file = folder / (named["name"] if named else "block.yaml")
    if file.exists() and named:
        raise ValueError(f"line {block.line}: {named['name']} is there already")
    file.write_text(block.text)
    whole = re.search(r"^base:", block.text, re.MULTILINE) is not None
    sections = read_yaml(file)
    if whole or {"tables", "data"} <= sections.keys():
        read_job(file)
        return
    types = get_type_hints(Job)
    unknown = sorted(sections.keys() - types.keys())
    if unknown or not sections:
        raise ValueError(f"line {block.line}: sections {unknown}; allowed: {sorted(types)}")
    load(dataclasses.make_dataclass("Sections", [(name, types[name]) for name in sections], frozen=True), sections)
