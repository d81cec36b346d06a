"""Imports inside the library go downward only, so that each layer can be read, tested and used without those above."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "torchrec_qr"

# Low to high: a module may import its own layer and those before it. A name stands for a module or a whole subpackage.
LAYERS = (
    ("late_errors",),
    ("ids", "id_hash", "no_full_table", "partitions", "variable_batches"),
    ("configs",),
    ("init", "fingerprint"),
    ("ops",),
    ("modules", "quant"),
    ("compression", "compress"),
    ("distributed",),
    ("planner",),
    ("inference",),
    ("cli",),
)
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def imported_modules(source: str, package: str) -> set[str]:
    """Returns the absolute names that a module of ``package`` imports, at any depth of its code.

    ``from p import n`` gives ``p.n``: n may be a module, and if it is not, its first parts are still those of one.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def violations(unit: str, source: str, package: str) -> list[str]:
    """Returns what is wrong with the imports of a module, whose place in LAYERS is ``unit``."""
    if unit not in LEVEL:
        return [f"torchrec_qr.{unit} is in no layer: add {unit!r} to LAYERS in {Path(__file__).name}"]
    wrong = []
    for name in sorted(imported_modules(source, package)):
        top, *rest = name.split(".")
        if top == "launch":
            wrong.append(f"imports {name}: launch is the application, which uses the library and not the reverse")
        # The package itself exports names of any layer, so that a module may take only `__version__` from it.
        if top == "torchrec_qr" and rest and rest[0] != "__version__":
            target = rest[0]
            if target not in LEVEL:
                wrong.append(f"imports {name}: name the module that defines it, not the package")
            elif LEVEL[target] > LEVEL[unit]:
                wrong.append(f"imports {name}: {target} is above {unit}")
    return wrong


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_downward(file: Path) -> None:
    package = ".".join(["torchrec_qr", *file.parts[:-1]])
    source = (PACKAGE / file).read_text()
    assert violations(file.with_suffix("").parts[0], source, package) == []


@pytest.mark.parametrize(
    ("unit", "source", "expected"),
    [
        ("ops", "from torchrec_qr.configs import Operation\nimport torchrec_qr.ops.path", []),
        ("cli", "from torchrec_qr import __version__\nfrom torchrec_qr.cli import doctor", []),
        ("ids", "import torchrec_qr.modules.path", ["imports torchrec_qr.modules.path: modules is above ids"]),
        ("ops", "def f():\n    from .. import modules", ["imports torchrec_qr.modules: modules is above ops"]),
        ("ops", "from ..modules.path import f", ["imports torchrec_qr.modules.path.f: modules is above ops"]),
        ("ops", "from .path import f\nfrom . import path", []),
        (
            "modules",
            "from torchrec_qr import QuotientRemainder",
            ["imports torchrec_qr.QuotientRemainder: name the module that defines it, not the package"],
        ),
        (
            "planner",
            "if True:\n    import launch.config",
            ["imports launch.config: launch is the application, which uses the library and not the reverse"],
        ),
        ("helpers", "", ["torchrec_qr.helpers is in no layer: add 'helpers' to LAYERS in test_layering.py"]),
    ],
)
def test_violations_are_found(unit: str, source: str, expected: list[str]) -> None:
    package = "torchrec_qr" if unit == "ids" else f"torchrec_qr.{unit}"
    assert violations(unit, source, package) == expected
