"""The forms of issues ask for what an answer needs. `make lint` checks them against GitHub's schema."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from torchrec_qr.cli.commands import main

FORMS = Path(__file__).parents[2] / ".github" / "ISSUE_TEMPLATE"


def fields(form: str) -> dict[str, Any]:
    body = yaml.safe_load((FORMS / form).read_text())["body"]
    return {field["id"]: field for field in body if field["type"] != "markdown"}


def required(form: str) -> list[str]:
    return [name for name, field in fields(form).items() if field["validations"]["required"]]


def test_a_bug_has_versions_config_code_and_error() -> None:
    assert required("bug.yml") == ["doctor", "config", "code", "error", "device"]
    assert fields("bug.yml")["code"]["attributes"]["render"] == "python"


def test_a_question_has_its_goal_and_what_was_tried() -> None:
    assert required("question.yml") == ["goal", "tried"]


def test_there_is_no_issue_without_a_form() -> None:
    assert yaml.safe_load((FORMS / "config.yml").read_text()) == {"blank_issues_enabled": False}


@pytest.mark.parametrize("form", ["bug.yml", "question.yml"])
def test_the_command_that_a_form_asks_for_is_there(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "`torchrec-qr doctor`" in fields(form)["doctor"]["attributes"]["label"]
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    assert "usage: torchrec-qr doctor" in capsys.readouterr().out
