"""The workflow on GitHub: its commands are those of this project, and its actions are pinned."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
# YAML 1.1 reads the key "on" as true.
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
STEPS = WORKFLOW["jobs"]["ci"]["steps"]
COMMANDS = [step["run"] for step in STEPS if "run" in step]


def test_pushes_to_main_and_pull_requests_run_it() -> None:
    assert WORKFLOW[True] == {"push": {"branches": ["main"]}, "pull_request": None, "workflow_dispatch": None}
    assert WORKFLOW["permissions"] == {"contents": "read"}


def test_it_runs_what_a_submission_must_pass() -> None:
    assert COMMANDS[-2:] == ["bash .ci/run", "make wheel docs"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"wheel", "docs"} <= set(targets)
    assert (ROOT / ".ci" / "run").is_file()


def test_wheel_and_site_are_kept_from_where_make_puts_them() -> None:
    kept = {step["with"]["name"]: step["with"]["path"] for step in STEPS if "upload" in step.get("uses", "")}
    assert kept == {"wheel": "dist/", "site": "build/docs/"}
    assert "out=${1:-dist}" in (ROOT / "scripts" / "build_wheel.sh").read_text()
    assert re.search(r"-m sphinx .* \. build/docs$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_actions_have_exact_versions() -> None:
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert len(used) == 3
    assert [action for action in used if not re.fullmatch(r"actions/[a-z-]+@v\d+\.\d+\.\d+", action)] == []


def test_the_workflow_is_said_to_be_untested() -> None:
    assert TEXT.startswith("# This workflow has not run on GitHub yet.")
    assert "It has not run on GitHub yet" in (ROOT / "CONTRIBUTING.md").read_text()
