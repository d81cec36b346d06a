"""A directive that shows the help of a command, so that no page has a copy of it.

``.. command-help:: torchrec_qr.cli plan`` shows what ``python -m torchrec_qr.cli plan --help`` prints.
"""

import os
import subprocess
import sys
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class CommandHelp(SphinxDirective):
    """Runs a module with ``--help`` and shows the output."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        # Python 3.14 colours help, and all versions fit it to the terminal.
        environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", *self.arguments, "--help"]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if shown.returncode:
            raise self.error(f"{command}: {shown.stderr}")
        return [nodes.literal_block(shown.stdout, shown.stdout, language="text")]


def setup(app: Any) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
