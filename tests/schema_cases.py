"""Helpers of the tests of the YAML sections."""

from pathlib import Path
from typing import Any

import pytest

from torchrec_qr.cli.schema import ConfigError


def error_of(function: Any, *args: Any) -> str:
    """The message with which the call fails."""
    with pytest.raises(ConfigError) as caught:
        function(*args)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    """A YAML file that holds ``text``."""
    file = folder / "job.yaml"
    file.write_text(text, encoding="utf-8")
    return file
