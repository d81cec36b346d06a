"""The committed table of what a step costs the host, ``step_costs.json``, which may only shrink.

Run as a program it measures all and writes the table anew: ``.venv/bin/python tests/cuda_without_gpu/step_costs.py``.
It refuses to write more than there was, save for cases that are new, unless it is told ``--allow-more``.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
TABLE = FOLDER / "step_costs.json"
UPDATE = ".venv/bin/python tests/cuda_without_gpu/step_costs.py"
# Costs of other libraries than this depend on these versions.
STACK = ("torch", "torchrec")
OWN = "torchrec_qr"
WAITS = ("host synchronisations", "blocking copies")

Costs = dict[str, Any]


def run_program(name: str, *args: str, parts: int = 1, timeout: float = 550) -> dict[str, Costs]:
    """Runs a program of this folder, which prints a line of JSON per case; returns the lines by case.

    Args:
        parts: as how many processes at a time, each of which is told its share of the cases: ``--part i parts``.
    """
    command = [sys.executable, str(FOLDER / name), *args]
    shares = [["--part", str(i), str(parts)] for i in range(parts)] if parts > 1 else [[]]

    def run(share: list[str]) -> str:
        done = subprocess.run(command + share, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stderr[-4000:]}"
        return done.stdout

    with ThreadPoolExecutor(parts) as pool:
        lines = [json.loads(line) for out in pool.map(run, shares) for line in out.splitlines() if line.startswith("{")]
    return {line.pop("case"): line for line in lines}


def run_device_cases(*cases: str) -> dict[str, Costs]:
    """Runs the cases, or all, on fake CUDA tensors, as two processes."""
    return run_program("run_device_cases.py", *cases, parts=2)


def condensed(costs: Costs, by_place: bool) -> dict[str, int]:
    """Numbers by "library, kind, place". Where not ``by_place``, only what the library itself waits for is by place."""
    out: dict[str, int] = {}
    for library, kinds in costs.items():
        for kind, places in kinds.items():
            waits = kind in WAITS
            if kind == "dispatcher calls":
                # Leave out what tells the device where tensors lie, because the allocator decides whether that is new.
                if library == OWN:
                    kept = [n for place, n in places.items() if "on_device" not in place]
                    out[f"{library}, {kind}, in all"] = sum(kept)
                continue
            own = library == OWN and (waits or by_place)
            if own or (waits and by_place):
                out |= {f"{library}, {kind}, {place}": n for place, n in places.items()}
            else:
                out[f"{library}, {kind}, in all"] = sum(places.values())
    return out


def differences(before: dict[str, int], now: dict[str, int], own_only: bool) -> tuple[list[str], list[str]]:
    """Returns what is more now than before, and what is less, in words."""
    keys = [key for key in sorted({*before, *now}) if key.startswith(f"{OWN},") or not own_only]
    numbers = {key: (before.get(key, 0), now.get(key, 0)) for key in keys}
    more = [f"{key}: {n}; allowed: at most {most}" for key, (most, n) in numbers.items() if n > most]
    less = [f"{key}: {n}; in the table: {most}" for key, (most, n) in numbers.items() if n < most]
    return more, less


def other_stack(table: Costs) -> bool:
    """Returns whether the table was measured with another torch or TorchRec than those at hand."""
    return bool(table["versions"] != {name: version(name) for name in STACK})


def check(case: str, measured: dict[str, int]) -> None:
    """Raises an AssertionError where a case costs more than the table says, or less."""
    table = json.loads(TABLE.read_text())
    assert case in table["steps"], f"{case!r} is not in {TABLE.name}: run `{UPDATE}`"
    more, less = differences(table["steps"][case], measured, other_stack(table))
    assert not more, "\n".join([f"{case} costs more than {TABLE.name} allows:", *more])
    assert not less, "\n".join([f"{case} costs less; lower {TABLE.name} by `{UPDATE}`:", *less])


def write(steps: dict[str, dict[str, int]], allow_more: bool) -> None:
    """Writes the table, unless a case that is in it costs more."""
    before = json.loads(TABLE.read_text())["steps"] if TABLE.exists() else {}
    grown = [line for case in steps if case in before for line in differences(before[case], steps[case], False)[0]]
    if grown and not allow_more:
        sys.exit("\n".join(["not written, because these cost more (--allow-more writes them):", *grown]))
    table = {"versions": {name: version(name) for name in STACK}, "steps": dict(sorted(steps.items()))}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def measured(results: dict[str, Costs], by_place: set[str] | None = None) -> dict[str, dict[str, int]]:
    """The costs of all cases that have some, condensed, launches by place for those in ``by_place``; None: for all."""
    return {
        case: condensed(result["costs"], by_place is None or case in by_place)
        for case, result in results.items()
        if "costs" in result
    }


def main() -> None:
    sys.path.append(str(FOLDER.parent))
    from device_cases import REFERENCE

    devices, launches = run_device_cases(), run_program("run_dry_launches.py")
    failed = [
        f"{case}: {r['error']}" for case, r in (devices | launches).items() if (r.get("error") or "").startswith("Tra")
    ]
    if failed:
        sys.exit("\n".join(failed))
    write(measured(devices, {case.id for case in REFERENCE}) | measured(launches), "--allow-more" in sys.argv[1:])


if __name__ == "__main__":
    main()
