"""The committed pictures: what the code draws from the committed numbers, with no text on another."""

import re
import warnings
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from benchmarks.open_vocabulary.open_page import committed_results, draw_picture
from benchmarks.picture_style import save, style
from benchmarks.pictures import RESULTS, draw_all


def test_a_picture_follows_from_its_numbers_and_is_crowded_nowhere(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_picture(committed_results(RESULTS), tmp_path)
    assert drawn.read_text() == (RESULTS / drawn.name).read_text()


@pytest.mark.slow
def test_all_pictures_follow_from_their_numbers_and_are_crowded_nowhere(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_all(RESULTS, tmp_path)
    assert {file.name for file in drawn} == {file.name for file in RESULTS.glob("*.svg")}
    for file in drawn:
        assert file.read_text() == (RESULTS / file.name).read_text(), file.name


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.svg")), ids=lambda file: file.name)
def test_pictures_are_small_and_have_a_dark_colour_for_every_light_one(file: Path) -> None:
    svg = file.read_text()
    assert len(svg) < 100_000
    style_sheet, drawing = svg.split("</style>", 1)
    rules = dict(
        re.findall(r'\[style\*="((?:fill|stroke): #\w{6})"\]\{((?:fill|stroke):#\w{6})!important\}', style_sheet)
    )
    used = set(re.findall(r"(?:fill|stroke): #\w{6}", drawing))
    assert "prefers-color-scheme:dark" in style_sheet
    assert used == set(rules)
    assert all(light.replace(" ", "") != dark for light, dark in rules.items())


def test_a_text_on_another_is_warned_of(tmp_path: Path) -> None:
    with style(10):
        figure, axis = plt.subplots()
        axis.text(0.5, 0.5, "one")
        axis.text(0.5, 0.5, "two")
        axis.text(2, 0.5, "three")
        with pytest.warns(UserWarning, match=r"x\.svg") as warned:
            save(figure, tmp_path / "x.svg", "x")
    assert {str(w.message) for w in warned} == {"x.svg: 'two' lies on 'one'", "x.svg: 'three' is cut off"}


def test_what_pages_show_in_place_of_a_picture_is_its_finding() -> None:
    shown = 0
    for page in [*(RESULTS.parents[1] / "docs").glob("*.md"), *RESULTS.glob("*.md")]:
        for text, target in re.findall(r"!\[([^\]]*)\]\(([^)]*\.svg)\)", page.read_text()):
            title = re.search(r"<title>(.*)</title>", (page.parent / target).read_text())
            assert title is not None
            assert text == title[1], page.name
            shown += 1
    assert shown >= 5
