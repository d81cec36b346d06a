"""The examples of docs/serving.md run as they stand."""

import re
from pathlib import Path
from typing import Any

import torch

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
EXPORT = "### A package of AOTInductor"
QUANTISED = "## Quantised rows"


def names_after(section: str) -> dict[str, Any]:
    """Runs the blocks of a section, and returns the names that they leave."""
    text = re.split(r"\n##+ ", PAGE.split(section)[1])[0]
    names: dict[str, Any] = {}
    for block in re.findall(r"<!-- A test runs this. -->\n```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/serving.md", "exec"), names)
    return names


def test_the_exported_model_computes_what_the_model_does() -> None:
    names = names_after(EXPORT)
    served = names["Served"](names["model"], ["user", "country"]).eval()
    dense, ids, lengths = torch.rand(2, 4), torch.tensor([5, 0, 12]), torch.tensor([[1, 1], [0, 1]])
    torch.testing.assert_close(names["program"].module()(dense, ids, lengths), served(dense, ids, lengths))


def test_the_quantised_model_computes_nearly_what_the_model_does() -> None:
    names = names_after(QUANTISED)
    out, expected = names["out"].to_dict(), names["model"]["sparse"](names["batch"]).to_dict()
    torch.testing.assert_close(out["user"], expected["user"], rtol=0.05, atol=1e-4)
    torch.testing.assert_close(out["country"], expected["country"], rtol=0, atol=0.01)
    assert out["user"].any(dim=1).tolist() == [True, True]
