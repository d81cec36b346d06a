"""Leaves out pictures that other hosts have, such as the README's badges, so that the site asks no other host."""

from typing import Any

from docutils import nodes


def drop_remote(app: Any, page: nodes.document) -> None:
    """Removes each image that has an address with a host from a page."""
    for image in list(page.findall(nodes.image)):
        if "://" in image["uri"]:
            image.parent.remove(image)


def setup(app: Any) -> dict[str, bool]:
    """Has Sphinx call `drop_remote` for each page that it has read."""
    app.connect("doctree-read", drop_remote)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
