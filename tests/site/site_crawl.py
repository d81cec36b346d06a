"""All pages of the built site that links lead to, as the browser has loaded them."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urldefrag
from urllib.request import urlopen

from headless_browser import HeadlessBrowser

_READ = """
const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
const names = [...document.querySelectorAll('a[name]')].map(e => e.name);
return {
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    anchors: [...ids, ...names],
    images: [...document.images].map(i => [i.currentSrc || i.src, i.naturalWidth]),
    title: document.title,
    width: document.documentElement.scrollWidth,
};
"""


@dataclass
class Page:
    """The links, anchors, images with their widths and errors of the console that the browser found on a page."""

    links: list[str]
    anchors: set[str]
    images: dict[str, int]
    title: str
    width: int
    console: list[str] = field(default_factory=list)


def crawl(browser: HeadlessBrowser, site: str, first: str) -> tuple[dict[str, Page], set[str]]:
    """Returns the pages that links lead to from ``first``, by address, and the addresses of their other files."""
    pages: dict[str, Page] = {}
    files: set[str] = set()
    waiting = [site + first]
    while waiting:
        address = waiting.pop()
        if address in pages or address in files:
            continue
        if not address.endswith(".html"):
            files.add(address)
            continue
        browser.open(address)
        found: dict[str, Any] = browser.run(_READ)
        pages[address] = Page(
            links=[link for link in found["links"] if link.startswith(site)],
            anchors=set(found["anchors"]),
            images=dict(found["images"]),
            title=found["title"],
            width=found["width"],
            console=browser.console(),
        )
        waiting += [urldefrag(link).url for link in pages[address].links]
    return pages, files


def dead_anchors(pages: dict[str, Page]) -> list[str]:
    """Returns the links to an element that its page does not have, each with the page that has the link."""
    dead = []
    for address, page in pages.items():
        for link in page.links:
            target, fragment = urldefrag(link)
            if fragment and target in pages and unquote(fragment) not in pages[target].anchors:
                dead.append(f"{address}: {link}")
    return dead


def status_of(address: str) -> int:
    """Returns the status of the server's answer; an error is raised for one of 400 and more."""
    with urlopen(address, timeout=10) as answer:
        return int(answer.status)
