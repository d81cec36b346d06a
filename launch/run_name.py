"""Names of runs, and links in their folders: neither may lead out of the folder of runs."""

from pathlib import Path


def is_run_name(name: str) -> bool:
    """Returns whether ``name`` is that of a folder within the folder of runs.

    Example:
        >>> [is_run_name(name) for name in ("day_7", "qr.2", "", "..", ".hidden", "a/b", "/etc", "a\\0b")]
        [True, True, False, False, False, False, False, False]
    """
    return bool(name) and not name.startswith(".") and "/" not in name and "\0" not in name


def refuse_links(*paths: Path) -> None:
    """Checks that none of ``paths``, in which a run renames and removes, is a symbolic link.

    Raises:
        ValueError: names the link, and where it leads.
    """
    for path in paths:
        if path.is_symlink():
            raise ValueError(
                f"{path} is a symbolic link to {path.readlink()}; allowed: a folder or file of its own, because a run "
                "renames and removes what is there. Link the folder of runs (--runs) instead"
            )
