"""The text before and after a diff."""


def one_side(diff: str, sign: str) -> str:
    """Returns the text that a diff has before (``-``) or after (``+``), with as many lines as the diff."""
    return "".join(f"{line[1:] if line[:1] in (' ', sign) else ''}\n" for line in diff.splitlines())
