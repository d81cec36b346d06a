"""The ratios of estimated and measured plans that docs/planner.md shows are those of the recorded runs."""

import json
import re

import pytest

from benchmarks.pictures import RESULTS

PAGE = (RESULTS.parents[1] / "docs" / "planner.md").read_text()


@pytest.mark.parametrize("link", ["loopback", "1gbit"])
def test_the_page_has_the_ratios_of_the_record(link: str) -> None:
    name = f"2026-11-25_planner_{link}.json"
    (row,) = re.findall(rf"^\| \[[^\]]*\]\(\.\./benchmarks/results/{name}\) \|(.*)\|$", PAGE, re.MULTILINE)
    record = json.loads((RESULTS / name).read_text())
    plans = record["plans"]
    ratios = [plan["estimated_ms"] / plan["measured_ms"] for plan in plans.values()]
    chosen = plans["chosen"]["measured_ms"]
    assert record["chosen_over_best"] == pytest.approx(chosen / min(p["measured_ms"] for p in plans.values()))
    assert record["chosen_over_torchrec"] == pytest.approx(chosen / plans["torchrec"]["measured_ms"])
    assert [cell.strip() for cell in row.split("|")] == [
        f"{record['spearman']:.2f}",
        f"{record['chosen_over_best']:.2f}",
        f"{record['chosen_over_torchrec']:.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
    ]


def test_the_page_has_the_slowest_drawn_plans_of_the_record() -> None:
    worst = []
    for link in ("loopback", "1gbit"):
        plans = json.loads((RESULTS / f"2026-11-25_planner_{link}.json").read_text())["plans"]
        drawn = [plan["measured_ms"] for name, plan in plans.items() if name.startswith("drawn")]
        assert len(drawn) == 12
        worst.append(f"up to {max(drawn) / plans['chosen']['measured_ms']:.1f} times")
    text = " ".join(PAGE.split())
    assert f"{worst[0]} the chosen one's time on loopback, and {worst[1]} at 1 Gbit/s" in text
