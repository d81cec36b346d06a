"""The site of docs/, which `make docs` builds. Its source is the checkout, so that links out of docs/ work."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from torchrec_qr import __version__  # noqa: E402

project = "torchrec_qr"
author = "torchrec_qr contributors"
copyright = "torchrec_qr contributors, BSD-3-Clause"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "command_help",
    "docstring_marks",
    "local_images",
]
myst_enable_extensions = ["html_image"]
# Headings have the anchors that forges give them.
myst_heading_anchors = 4
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "benchmarks/results/*.md",
    "examples/**README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
]
exclude_patterns = [".*", "docs/root", "build", "dist", "runs", "**/__pycache__", "**/*.egg-info"]
# Pages outside docs/ have a link in place of an entry, and some results begin with a second-level heading.
suppress_warnings = ["toc.not_included", "myst.header"]

# A name in single backticks in a docstring is a link, and an error if it is nowhere in the reference.
default_role = "any"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "torchrec_qr"
html_favicon = "static/icon.svg"
html_static_path = ["static"]
html_css_files = ["site.css", "colour_scheme.css"]
# The site's root leads to the first page.
html_extra_path = ["root"]
html_domain_indices = False
html_copy_source = False
html_show_sphinx = False
