"""Versions of torch, FBGEMM and TorchRec that fit together, and the pip commands that lead to them."""

import re
import shlex
from dataclasses import dataclass, replace

from torchrec_qr.cli.installed_stack import Stack

# The modules that TorchRec needs and `pip install --no-deps torchrec` leaves out, with the package of each.
TORCHREC_NEEDS = {
    "iopath": "iopath",
    "pyre_extensions": "pyre-extensions",
    "tensordict": "tensordict",
    "torchmetrics": "torchmetrics==1.0.3",
    "tqdm": "tqdm",
}


@dataclass(frozen=True)
class Trio:
    """Versions of torch, FBGEMM and TorchRec that were seen working together."""

    torch: str
    fbgemm: str
    torchrec: str


# The versions of requirements/trio-*.txt, old to new.
TESTED = (Trio("2.11.0", "1.6.0", "1.6.1"), Trio("2.13.0", "1.8.0", "1.8.0"), Trio("2.14.1", "1.9.0", "1.9.2"))


def version_problem(stack: Stack) -> str | None:
    """Returns what is wrong with the installed versions, and the command that mends it; None: they fit.

    FBGEMM 1.a and TorchRec 1.b fit if a = b, and PyTorch 2.m fits them if m = a + 5. Their release tables have it so.

    Example:
        >>> version_problem(Stack("2.13.0", "CUDA 13.0", {"fbgemm-gpu": "1.8.0"}, "1.8.0"))
        >>> print(version_problem(Stack("2.13.0", "CUDA 13.0", {"fbgemm-gpu": "1.9.0"}, "1.8.0")))
        torch 2.13.0, fbgemm-gpu 1.9.0 and torchrec 1.8.0 do not fit together. Run: pip install fbgemm-gpu==1.8.0
    """
    misplaced = len(stack.fbgemm) > 1 or (stack.torch_build == "CPU" and "fbgemm-gpu" in stack.fbgemm)
    cure = mend(replace(stack, fbgemm={}) if misplaced else stack)
    if misplaced:
        # Both distributions own the same files, so what is left after removing one is in pieces: remove all there is.
        cure = f"pip uninstall -y {' '.join(stack.fbgemm)} && {cure}"

    parts = {"torch": stack.torch, stack.fbgemm_name: stack.fbgemm, "torchrec": stack.torchrec}
    absent = [name for name, there in parts.items() if not there]
    if absent:
        problem = f"{_joined(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
    elif len(stack.fbgemm) > 1:
        both = _joined([f"{name} {version}" for name, version in stack.fbgemm.items()])
        problem = f"{both} are both installed, and overwrite each other's files"
    elif misplaced:
        problem = f"fbgemm-gpu {stack.fbgemm['fbgemm-gpu']} is built for CUDA, and torch {stack.torch} without"
    elif not _fits(stack):
        problem = f"{described(stack)} do not fit together"
    else:
        return None
    return f"{problem}. Run: {cure}"


def is_tested(stack: Stack) -> bool:
    """Returns whether the three minor versions are those of a trio in ``TESTED``.

    Example:
        >>> is_tested(Stack("2.14.0", "CUDA 13.0", {"fbgemm-gpu": "1.9.0"}, "1.9.2"))
        True
        >>> is_tested(Stack("2.15.0", "CUDA 13.0", {"fbgemm-gpu": "1.10.0"}, "1.10.0"))
        False
    """
    minors = _minors(stack)
    return any(minors == tuple(map(_minor, (trio.torch, trio.fbgemm, trio.torchrec))) for trio in TESTED)


def mend(stack: Stack, reinstall: tuple[str, ...] = ()) -> str:
    """Returns the pip commands that make the stack fit: they change what must change, and install ``reinstall`` anew.

    Args:
        stack (Stack): what is installed.
        reinstall (tuple[str, ...]): of ``torch``, ``fbgemm`` and ``torchrec``.

    Example:
        >>> print(mend(Stack("2.13.0", "CUDA 13.0", {"fbgemm-gpu": "1.8.0"}, "1.8.0"), reinstall=("fbgemm",)))
        pip install --force-reinstall --no-deps fbgemm-gpu==1.8.0
    """
    goal, name = _goal(stack), stack.fbgemm_name
    wanted = {}
    for part, distribution, installed, version in (
        ("torch", "torch", stack.torch, goal.torch),
        ("fbgemm", name, _fbgemm(stack), goal.fbgemm),
        ("torchrec", "torchrec", stack.torchrec, goal.torchrec),
    ):
        if installed is None or _minor(installed) != _minor(version):
            wanted[part] = f"{distribution}=={version}"
        elif part in reinstall:
            wanted[part] = f"{distribution}=={installed.split('+')[0]}"
    # With what it requires, torchrec would bring fbgemm-gpu along; beside fbgemm-gpu-cpu it goes in alone.
    alone = wanted.pop("torchrec", None) if name == "fbgemm-gpu-cpu" else None
    force = "--force-reinstall " if reinstall else ""
    # Let torch bring its own libraries along, because they may be what is missing.
    force += "--no-deps " if reinstall and "torch" not in wanted else ""
    commands = [f"pip install {force}{shlex.join(wanted.values())}"] if wanted else []
    if alone:
        commands.append(f"pip install {'--force-reinstall ' if reinstall else ''}--no-deps {shlex.join([alone])}")
        if stack.torchrec is None:
            commands.append(f"pip install {shlex.join(TORCHREC_NEEDS.values())}")
    return " && ".join(commands)


def described(stack: Stack) -> str:
    """Returns the names and versions of a stack of which nothing is missing.

    Example:
        >>> described(Stack("2.13.0", "CUDA 13.0", {"fbgemm-gpu": "1.8.0"}, "1.8.0"))
        'torch 2.13.0, fbgemm-gpu 1.8.0 and torchrec 1.8.0'
    """
    fbgemm = [f"{name} {version}" for name, version in stack.fbgemm.items()]
    return _joined([f"torch {stack.torch}", *fbgemm, f"torchrec {stack.torchrec}"])


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _fbgemm(stack: Stack) -> str | None:
    return stack.fbgemm.get(stack.fbgemm_name) or next(iter(stack.fbgemm.values()), None)


def _minors(stack: Stack) -> tuple[tuple[int, int], ...]:
    return tuple(_minor(version or "") for version in (stack.torch, _fbgemm(stack), stack.torchrec))


def _fits(stack: Stack) -> bool:
    torch, fbgemm, torchrec = _minors(stack)
    return fbgemm == torchrec and torch == (fbgemm[0] + 1, fbgemm[1] + 5)


def _goal(stack: Stack) -> Trio:
    """Returns the trio that changes least: it keeps torch if it can, else FBGEMM, else it is the newest tested one."""
    torch, fbgemm, torchrec = _minors(stack)
    fitting = (torch[0] - 1, torch[1] - 5)
    if stack.torch and fitting in (fbgemm, torchrec):
        known = next((trio for trio in TESTED if _minor(trio.torch) == torch), None)
        return known or Trio(stack.torch, *["{}.{}.*".format(*fitting)] * 2)
    for index, part in enumerate((torch, fbgemm)):
        for trio in TESTED:
            if _minor((trio.torch, trio.fbgemm)[index]) == part:
                return trio
    return TESTED[-1]


def _joined(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
