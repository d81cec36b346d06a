"""Frozen dataclasses from mappings and back; an unknown key, a wrong type or a value out of range is an error."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import cache, partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from torchrec_qr.cli.schema.config_error import ConfigError, did_you_mean, key_path, unknown_key

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may take, given as ``Annotated[int, Range(1, 1000)]``; `load` checks it.

    Args:
        low (float | None): least value.
        high (float | None): greatest value.
        above (float | None): a bound that is itself not allowed.
        below (float | None): likewise.
        multiple_of (int | None): of which the value is a multiple.

    Example:
        >>> str(Range(1, 1000)), str(Range(above=0)), str(Range(0, below=1))
        ('1..1000', 'above 0', 'at least 0 and below 1')
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    multiple_of: int | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low}..{self.high}"
        bounds = (
            ("at least", self.low),
            ("at most", self.high),
            ("above", self.above),
            ("below", self.below),
            ("a multiple of", self.multiple_of),
        )
        return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)


def load(cls: type[T], given: object, path: str = "") -> T:
    """Returns an instance of ``cls`` with the values of a mapping, such as a section of a YAML file.

    A field's type may be a dataclass, several dataclasses that have a class variable ``kind`` (the mapping's key
    ``kind`` chooses among them), ``list[X]``, ``Sequence[X]``, ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]``,
    ``X | None``, ``Literal``, an enum (by a member's name in lower case), ``bool``, ``int``, ``float``, ``str``, or one
    of these ``Annotated`` with a `Range`. Nothing is converted but an int to the float, and a list to the tuple, that a
    field asks for: a bool is no int, and ``"3"`` is not 3. A ``ConfigError``, ``ValueError`` or ``TypeError`` of a
    class's own ``__post_init__`` is reported at the path of the instance.

    Args:
        cls (type[T]): a dataclass, or any other of the types above (``list[TableSpec]``).
        given (object): the mapping.
        path (str): where ``given`` stands in its file; errors begin with it.

    Raises:
        ConfigError: an unknown key (with the nearest known name), a missing one, a wrong type or a value out of range:
            all of the mapping's errors together.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Training:
        ...     learning_rate: Annotated[float, Range(above=0)]
        ...     batch_size: Annotated[int, Range(1)] = 1024
        >>> load(Training, {"learning_rate": 1})
        Training(learning_rate=1.0, batch_size=1024)
        >>> load(Training, {"learning_rate": 0.1, "batchsize": 64}, path="training")
        Traceback (most recent call last):
        torchrec_qr.cli.schema.config_error.ConfigError: training.batchsize: unknown key; did you mean 'batch_size'?
    """
    return cast(T, _convert(cls, given, path))


def dump(instance: object, *, defaults: bool = True) -> dict[str, Any]:
    """Returns a dataclass instance as plain dicts, lists, strings and numbers, of which `load` makes an equal one.

    Args:
        instance (object): of a dataclass that `load` can load.
        defaults (bool): whether fields that have their default value are included.

    Example:
        >>> from torchrec_qr.partitions import MixedRadix
        >>> dump(MixedRadix(sizes=[10, 10]), defaults=False)
        {'kind': 'mixed_radix', 'sizes': [10, 10]}
    """
    kind = _kind(type(instance))
    dumped: dict[str, Any] = {} if kind is None else {"kind": kind}
    for field in _fields(type(instance)):
        value = getattr(instance, field.name)
        if defaults or value != _default(field):
            dumped[field.name] = _plain(value, defaults)
    return dumped


def gather(conversions: Iterable[Callable[[], T]]) -> list[T]:
    """Returns what the ``conversions`` return, or raises the errors of all of them as one `ConfigError`."""
    values, errors = [], []
    for conversion in conversions:
        try:
            values.append(conversion())
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise ConfigError.joined(errors)
    return values


def _convert(hint: Any, given: object, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _ranged(args, given, path)
    if origin in (Union, UnionType):
        inner = [arg for arg in args if arg is not NoneType]
        if given is None and len(inner) < len(args):
            return None
        if len(inner) == 1:
            return _convert(inner[0], given, path)
        if all(isinstance(arg, type) and dataclasses.is_dataclass(arg) and _kind(arg) for arg in inner):
            return _of_kind(inner, given, path)
    if origin is Literal:
        for choice in args:
            if type(choice) is type(given) and choice == given:
                return choice
        raise _no_choice(path, given, args)
    if origin in (list, Sequence):
        return _items(args * _length(given, path), given, path)
    if origin is tuple:
        variadic = len(args) == 2 and args[1] is Ellipsis
        return tuple(_items(args[:1] * _length(given, path) if variadic else args, given, path))
    if origin is dict:
        return _mapping(args, given, path)
    if dataclasses.is_dataclass(hint):
        return _instance(cast(type, hint), given, path)
    if isinstance(hint, type) and issubclass(hint, Enum):
        members = {member.name.lower(): member for member in hint}
        if isinstance(given, str) and given in members:
            return members[given]
        raise _no_choice(path, given, tuple(members))
    if hint in (bool, int, float, str):
        return _scalar(hint, given, path)
    raise TypeError(f"{path}: a config cannot have a field of the type {hint}")


def _ranged(args: tuple[Any, ...], given: object, path: str) -> Any:
    value = _convert(args[0], given, path)
    for limit in args[1:]:
        if isinstance(limit, Range) and value is not None and value not in limit:
            raise ConfigError(path, given, str(limit))
    return value


def _no_choice(path: str, given: object, choices: tuple[object, ...]) -> ConfigError:
    hint = did_you_mean(given, [c for c in choices if isinstance(c, str)]) if isinstance(given, str) else ""
    return ConfigError(path, given, ", ".join(repr(choice) for choice in choices) + (hint and f"; {hint}"))


def _length(given: object, path: str) -> int:
    if not isinstance(given, list | tuple):
        raise ConfigError(path, given, "a list")
    return len(given)


def _items(hints: tuple[Any, ...], given: object, path: str) -> list[Any]:
    if _length(given, path) != len(hints):
        raise ConfigError(path, given, f"a list of {len(hints)}")
    items = enumerate(zip(hints, cast(list[object], given), strict=True))
    return gather(partial(_convert, hint, item, f"{path}[{i}]") for i, (hint, item) in items)


def _mapping(hints: tuple[Any, ...], given: object, path: str) -> dict[Any, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(path, given, "a mapping")
    key_hint, value_hint = hints
    keys = gather(partial(_convert, key_hint, key, f"{key_path(path, key)}, the key") for key in given)
    values = gather(partial(_convert, value_hint, value, key_path(path, key)) for key, value in given.items())
    return dict(zip(keys, values, strict=True))


def _of_kind(classes: list[Any], given: object, path: str) -> Any:
    kinds = {_kind(cls): cls for cls in classes}
    if not isinstance(given, Mapping):
        raise ConfigError(path, given, "a mapping with a kind")
    if "kind" not in given:
        raise ConfigError(key_path(path, "kind"), None, "a value", "missing, and has no default")
    kind = _convert(Literal[*kinds], given["kind"], key_path(path, "kind"))
    fields = {key: value for key, value in given.items() if key != "kind"}
    own = [field.name for field in _fields(kinds[kind])]
    foreign = {field.name for cls in classes for field in _fields(cls)}.difference(own)
    problem = f"not a key of kind {kind!r}, whose keys are {', '.join(own)}"
    errors = [
        ConfigError(key_path(path, key), fields[key], ", ".join(own), problem) for key in fields if key in foreign
    ]
    if errors:
        raise ConfigError.joined(errors)
    return _instance(kinds[kind], fields, path)


def _kind(cls: type) -> str | None:
    """Returns the class variable ``kind``, by which `_of_kind` chooses, or None if there is none."""
    return None if any(field.name == "kind" for field in _fields(cls)) else getattr(cls, "kind", None)


def _fields(cls: type) -> "list[dataclasses.Field[Any]]":
    return [f for f in dataclasses.fields(cast(Any, cls)) if f.init and f.metadata.get("in_yaml", True)]


def _instance(cls: type, given: object, path: str) -> Any:
    hints = _hints(cls)
    fields = {field.name: field for field in _fields(cls)}
    if not isinstance(given, Mapping):
        raise ConfigError(path, given, f"a mapping with keys of {', '.join(fields)}")
    errors = [unknown_key(path, key, value, fields) for key, value in given.items() if key not in fields]
    values = {}
    for name, field in fields.items():
        # Load an empty section for one that is left out, because errors of its defaults belong at its own path.
        is_section = field.default_factory is hints[name] and dataclasses.is_dataclass(hints[name])
        if name in given or is_section:
            try:
                values[name] = _convert(hints[name], given.get(name, {}), key_path(path, name))
            except ConfigError as error:
                errors.append(error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            errors.append(ConfigError(key_path(path, name), None, "a value", "missing, and has no default"))
    if errors:
        raise ConfigError.joined(errors)
    try:
        return cls(**values)
    except ConfigError as error:
        raise error.under(path) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(path, given, str(error), str(error)) from error


def _scalar(hint: type, given: object, path: str) -> object:
    if type(given) is hint:
        # Refuse NaN, because it passes no comparison with a range. It alone is unequal to itself.
        if given != given:
            raise ConfigError(path, given, "a number")
        return given
    if hint is float and type(given) is int:
        try:
            return float(given)
        except OverflowError:
            pass
    raise ConfigError(path, given, hint.__name__)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _default(field: "dataclasses.Field[Any]") -> Any:
    """Returns the field's default value, or ``MISSING`` if it has none that is valid by itself."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    try:
        return field.default_factory()
    except (TypeError, ValueError):
        return dataclasses.MISSING


def _plain(value: object, defaults: bool) -> object:
    if dataclasses.is_dataclass(value):
        return dump(value, defaults=defaults)
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, list | tuple):
        return [_plain(item, defaults) for item in value]
    if isinstance(value, Mapping):
        return {_plain(key, defaults): _plain(item, defaults) for key, item in value.items()}
    return value
