"""Compares the skipped tests of pytest's JUnit reports with the committed list: no test stops running unnoticed.

Usage: ``check_skips.py LIST.txt REPORT.xml ...``. A line of the list is ``node id or its beginning | reason``; lines
that start with ``#`` are comments, and ``?`` before a line says that its tests run on some machines: they need files
that only those have. Exit code 1, saying why, if a test skipped that no line names, if a line names no test that
skipped, or if no test of a report ran.
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


def read_report(path: str, root: Path) -> tuple[int, dict[str, str]]:
    """Returns the number of tests in a report, and the reason of each that skipped, by node id."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    skips = {}
    for case in cases:
        skipped = case.find("skipped")
        # An expected failure is reported as a skip too, but it ran.
        if skipped is not None and skipped.get("type") != "pytest.xfail":
            skips[node_id(case, root)] = skipped.get("message", "")
    return len(cases), skips


def main(list_path: str, *reports: str) -> int:
    """Prints each difference between reports and list; returns the exit code."""
    of_reports = {path: read_report(path, Path.cwd()) for path in reports}
    skips = {test: reason for _, of_report in of_reports.values() for test, reason in of_report.items()}
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
    problems += [
        f"no test ran: {path} has {number}, {len(of_report)} skipped"
        for path, (number, of_report) in of_reports.items()
        if number == len(of_report)
    ]
    total = sum(number for number, _ in of_reports.values())
    print(*problems or [f"skips as expected: {len(skips)} of {total} tests"], sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
