"""The one exception of configs: which key, what was given, what is allowed."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_LONGEST_VALUE = 100
_MOST_NAMES = 20


class ConfigError(ValueError):
    """A config is wrong, at one key or at several.

    Attributes:
        path (str): of the key, such as ``tables[3].partitions.sizes``; relative to the instance if its own
            ``__post_init__`` raises. With several errors ``path``, ``given`` and ``allowed`` are the first one's.
        given (object): the value found there.
        allowed (str): what may be there, in words.
        errors (tuple[ConfigError, ...]): every error, each on its own; ``(self,)`` if there is but one.
        file (str | None): the file that the config was read from, if any.

    Example:
        >>> print(ConfigError("num_collisions", 0, "1..1000").under("tables[3].partitions"))
        tables[3].partitions.num_collisions: 0; allowed: 1..1000
    """

    def __init__(
        self,
        path: str,
        given: object,
        allowed: str,
        problem: str | None = None,
        others: "tuple[ConfigError, ...]" = (),
        file: str | None = None,
    ) -> None:
        # Pass all of them in order, because pickle calls the class with `args` where a worker's error arrives.
        super().__init__(path, given, allowed, problem, others, file)
        self.path = path
        self.given = given
        self.allowed = allowed
        self.file = file
        self._problem = problem or f"{_short(given)}; allowed: {allowed}"
        self._others = others

    @classmethod
    def joined(cls, errors: "Sequence[ConfigError]", file: str | None = None) -> "ConfigError":
        """Returns one error for all of ``errors``, of which there is at least one."""
        first, *others = (single for error in errors for single in error.errors)
        return cls(first.path, first.given, first.allowed, first._problem, tuple(others), file)

    @property
    def errors(self) -> "tuple[ConfigError, ...]":
        if not self._others:
            return (self,)
        return (ConfigError(self.path, self.given, self.allowed, self._problem), *self._others)

    def under(self, prefix: str) -> "ConfigError":
        """Returns the same error for a value that lies at ``prefix``."""
        moved = [
            ConfigError(_concatenated(prefix, e.path), e.given, e.allowed, e._problem, file=e.file) for e in self.errors
        ]
        return ConfigError.joined(moved, self.file)

    def in_file(self, file: str | Path) -> "ConfigError":
        """Returns the same error, its message headed by the file's name."""
        return ConfigError.joined(self.errors, str(file))

    def __str__(self) -> str:
        head = f"{self.file}: " if self.file else ""
        lines = [f"{e.path}: {e._problem}" if e.path else e._problem for e in self.errors]
        return head + (lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} errors", *lines]))


@contextmanager
def errors_in_file(file: str | Path) -> Iterator[None]:
    """Heads errors with the name of the file that the config was read from; see `ConfigError.in_file`."""
    try:
        yield
    except ConfigError as error:
        raise error.in_file(file) from None


def unknown_key(path: str, key: object, given: object, known: Iterable[str], what: str = "unknown key") -> ConfigError:
    """Returns the error of a ``key`` at ``path`` that is not among the ``known``, with the nearest of those."""
    known = list(known)
    allowed = first_names(known)
    hint = did_you_mean(key, known) or f"allowed: {allowed}"
    return ConfigError(key_path(path, key), given, allowed, f"{what}; {hint}")


def first_names(names: Sequence[str]) -> str:
    """Returns the first 20 names, with an ellipsis if there are more."""
    return ", ".join(names[:_MOST_NAMES]) + (", …" if len(names) > _MOST_NAMES else "")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns ``"did you mean '<the nearest of known>'?"``, or nothing if none is near.

    Example:
        >>> did_you_mean("num_embedings", ["num_embeddings", "embedding_dim"])
        "did you mean 'num_embeddings'?"
    """
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def key_path(path: str, key: object) -> str:
    """Returns the path of ``key`` in the mapping at ``path``, in brackets if a dot would mislead.

    Example:
        >>> key_path("planner.constraints", "t_user"), key_path("planner.constraints", "sparse.user")
        ('planner.constraints.t_user', "planner.constraints['sparse.user']")
    """
    plain = isinstance(key, str) and re.fullmatch(r"[A-Za-z_][\w-]*", key)
    return _concatenated(path, str(key) if plain else f"[{key!r}]")


def _concatenated(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path and not path.startswith("[") else f"{prefix}{path}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
