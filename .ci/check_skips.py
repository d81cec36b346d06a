"""Compares the skipped tests of a pytest JUnit report with the committed list: no test stops running unnoticed.

Usage: ``check_skips.py REPORT.xml LIST.txt``. A line of the list is ``node id or its beginning | reason``; lines that
start with ``#`` are comments, and ``?`` before a line says that its tests run on some machines: they need files that
only those have. Exit code 1, saying why, if a test skipped that no line names, if a line names no test
that skipped, or if no test ran.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree


def node_id(case: ElementTree.Element, root: Path) -> str:
    """Returns ``tests/test_x.py::TestY::test_z[1]`` of a test case, whose report has a dotted path and a name.

    A module that skips as a whole has its dotted path for a name.
    """
    classname, name = case.get("classname", ""), case.get("name", "")
    parts = [*classname.split("."), name] if classname else name.split(".")
    for length in range(len(parts), 0, -1):
        path = Path(*parts[:length]).with_suffix(".py")
        if (root / path).is_file():
            return "::".join([path.as_posix(), *parts[length:]])
    return "::".join(parts)


def read_list(path: Path) -> tuple[dict[str, str], set[str]]:
    """Returns the reason of each node id in the list, and which of them run on some machines."""
    expected, on_some = {}, set()
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        prefix, _, reason = (part.strip() for part in line.partition("|"))
        if not prefix or not reason:
            sys.exit(f"{path}:{number}: expected 'node id | reason', got {line!r}")
        if prefix.startswith("?"):
            prefix = prefix.removeprefix("?")
            on_some.add(prefix)
        expected[prefix] = reason
    return expected, on_some


def main(report: str, list_path: str) -> int:
    """Prints each difference between report and list; returns the exit code."""
    root = Path.cwd()
    cases = list(ElementTree.parse(report).iter("testcase"))
    skips = {}
    for case in cases:
        skipped = case.find("skipped")
        # An expected failure is reported as a skip too, but it ran.
        if skipped is not None and skipped.get("type") != "pytest.xfail":
            skips[node_id(case, root)] = skipped.get("message", "")
    expected, on_some = read_list(Path(list_path))

    problems = [
        f"skipped, and not in {list_path}: {test} ({reason})"
        for test, reason in skips.items()
        if not test.startswith(tuple(expected))
    ]
    problems += [
        f"in {list_path}, but no such test skipped: {prefix}"
        for prefix in expected
        if prefix not in on_some and not any(test.startswith(prefix) for test in skips)
    ]
    if len(cases) == len(skips):
        problems.append(f"no test ran: {len(cases)} collected, {len(skips)} skipped")
    print(*problems or [f"skips as expected: {len(skips)} of {len(cases)} tests"], sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
