"""The built site in a browser: every link, anchor and image is there, and text is legible in light and dark."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from headless_browser import HeadlessBrowser
from site_crawl import Page, crawl, dead_anchors, status_of
from text_contrast import background, contrast, contrasts_of_text

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "docs"
SCREENSHOTS = ROOT / "build" / "screenshots"
START = "docs/index.html"
# A start page, a guide with tables and code, and a page of the API.
SHOWN = {"start": START, "guide": "docs/quickstart.html", "reference": "docs/reference/collections.html"}
PHONE = 390


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[HeadlessBrowser]:
    with HeadlessBrowser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def crawled(browser: HeadlessBrowser, site: str) -> tuple[dict[str, Page], set[str]]:
    return crawl(browser, site, START)


@pytest.fixture(scope="module")
def pages(crawled: tuple[dict[str, Page], set[str]]) -> dict[str, Page]:
    return crawled[0]


def test_links_reach_every_page(pages: dict[str, Page], site: str) -> None:
    built = {f"{site}{path.relative_to(SITE).as_posix()}" for path in SITE.rglob("*.html")}
    # The search page is the target of a form, and the root leads to the start page.
    assert built - pages.keys() <= {f"{site}search.html", f"{site}index.html"}
    assert pages.keys() <= built
    assert all(page.title for page in pages.values())


def test_every_anchor_is_an_element(pages: dict[str, Page]) -> None:
    assert sum("#" in link for page in pages.values() for link in page.links) > 100
    assert dead_anchors(pages) == []


def test_every_linked_file_is_there(crawled: tuple[dict[str, Page], set[str]]) -> None:
    files = crawled[1]
    assert any(file.endswith(".py") for file in files)
    assert {status_of(file) for file in files} == {200}


def test_every_image_is_shown(pages: dict[str, Page]) -> None:
    images = {image: width for page in pages.values() for image, width in page.images.items()}
    assert any("quality_size" in image for image in images)
    assert [image for image, width in images.items() if width == 0] == []


def test_the_console_has_no_errors(pages: dict[str, Page]) -> None:
    assert {address: page.console for address, page in pages.items() if page.console} == {}


def test_pages_ask_no_other_host(pages: dict[str, Page], browser: HeadlessBrowser, site: str) -> None:
    asked = {urlsplit(address).netloc for address in browser.requests() if address.startswith(("http", "ws"))}
    assert asked == {urlsplit(site).netloc}


@pytest.mark.parametrize("name", SHOWN)
def test_text_is_legible_in_light_and_dark(name: str, browser: HeadlessBrowser, site: str) -> None:
    backgrounds = {}
    for scheme in ("light", "dark"):
        browser.set_scheme(scheme)
        browser.open(site + SHOWN[name])
        browser.screenshot(SCREENSHOTS / f"{name}_{scheme}.png")
        found = contrasts_of_text(browser)
        assert len(found) > 3
        assert {text: round(ratio, 2) for text, ratio in found.items() if ratio < 4.5} == {}
        backgrounds[scheme] = background(browser)
    assert contrast(backgrounds["light"], backgrounds["dark"]) > 10


def test_no_page_is_wider_than_a_phone(pages: dict[str, Page], browser: HeadlessBrowser, site: str) -> None:
    browser.set_scheme("light")
    browser.set_width(PHONE)
    try:
        for name, path in SHOWN.items():
            browser.open(site + path)
            browser.screenshot(SCREENSHOTS / f"{name}_phone.png")
        wide = {}
        for address in pages:
            browser.open(address)
            width = browser.run("return document.documentElement.scrollWidth")
            if width > PHONE:
                wide[address] = width
        assert wide == {}
    finally:
        browser.set_width(0)


def test_the_search_finds_a_page(browser: HeadlessBrowser, site: str) -> None:
    browser.open(f"{site}search.html?q=row-wise")
    script = "return [...document.querySelectorAll('#search-results li a')].map(a => a.href)"
    assert any("/docs/" in link for link in browser.run(script))
