"""The workflow on GitHub: its commands are those of this project, and its actions are pinned."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
# YAML 1.1 reads the key "on" as true.
WORKFLOW: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
STEPS = {job: content["steps"] for job, content in WORKFLOW["jobs"].items()}


def commands(job: str) -> list[str]:
    return [step["run"] for step in STEPS[job] if "run" in step]


def test_pushes_to_main_and_pull_requests_run_it() -> None:
    assert WORKFLOW[True] == {"push": {"branches": ["main"]}, "pull_request": None, "workflow_dispatch": None}
    assert WORKFLOW["permissions"] == {"contents": "read"}


def test_it_runs_what_a_submission_must_pass() -> None:
    assert commands("ci") == ["bash .ci/run"]
    assert commands("wheel")[-2:] == ["make wheel", "make test-wheel"]
    assert commands("docs") == ["make docs"]
    assert (ROOT / ".ci" / "run").is_file()


def test_actions_have_exact_versions() -> None:
    used = [step["uses"] for steps in STEPS.values() for step in steps if "uses" in step]
    assert {action.partition("@")[0] for action in used} == {
        "actions/checkout",
        "actions/setup-python",
        "actions/upload-artifact",
    }
    assert [action for action in used if not re.fullmatch(r"actions/[a-z-]+@v\d+\.\d+\.\d+", action)] == []


def test_wheel_and_docs_are_kept() -> None:
    for job in ("wheel", "docs"):
        kept = STEPS[job][-1]["with"]
        assert (kept["name"], kept["if-no-files-found"]) == (job, "error")


def test_the_python_is_the_one_that_make_takes() -> None:
    versions = {step["with"]["python-version"] for steps in STEPS.values() for step in steps if "setup-py" in str(step)}
    assert {f"python{version}" for version in versions} == {WORKFLOW["env"]["PYTHON"]}


def test_the_workflow_is_said_to_be_untested() -> None:
    assert (ROOT / ".github" / "workflows" / "ci.yml").read_text().startswith("# This workflow has not run on GitHub")
