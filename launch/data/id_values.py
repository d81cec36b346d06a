"""Category ids of an Arrow column, of any type, as 64-bit integers."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from launch.data.rows import MISSING, Array

# It takes the wrong rows of a column, and what is allowed there.
Report = Callable[[Array, str], None]

ALLOWED_TYPES = "integers, whole floats or decimals, strings, binary, dictionaries or lists of these"
ALLOWED_INTEGERS = "an integer from -2^63 + 1 to 2^64 - 1 but 2^63, or nothing"
_HEXADECIMAL = "1 to 16 hexadecimal digits or nothing"
_CANONICAL = r"^(0|-?[1-9][0-9]{0,19})(\.0)?$"  # pandas writes ".0" in a column that has nulls
_MAX_DIGITS = 16

_CODES = bytearray([0x80] * 256)  # the value of a hexadecimal digit; the high bit marks every other character
for _value, _digit in enumerate("0123456789abcdef"):
    _CODES[ord(_digit)] = _CODES[ord(_digit.upper())] = _value
_HIGH_BITS = np.uint64(0x8080808080808080)

NUMBERS = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
_LISTS = (
    *(types.is_list, types.is_large_list, types.is_fixed_size_list),
    *(types.is_list_view, types.is_large_list_view),
)
_TEXTS = (
    *(types.is_string, types.is_large_string, types.is_string_view),
    *(types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary),
)


def is_id_type(kind: pa.DataType) -> bool:
    """Returns whether `id_values` reads a column of this type."""
    if is_list(kind):
        return not is_list(kind.value_type) and is_id_type(kind.value_type)
    if types.is_dictionary(kind):
        return is_id_type(kind.value_type)
    return is_one_of(kind, NUMBERS) or _is_text(kind) or (types.is_decimal(kind) and kind.scale == 0)


def is_list(kind: pa.DataType) -> bool:
    """Returns whether a type is one of Arrow's lists."""
    return is_one_of(kind, _LISTS)


def is_one_of(kind: pa.DataType, checks: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    """Returns whether a type passes one of the ``checks``, which are functions of ``pa.types``."""
    return any(check(kind) for check in checks)


def id_values(column: pa.Array, hexadecimal: bool, report: Report) -> tuple[Array, Array | None]:
    """Returns ids (B,), or from a column of lists ids (N,) and their lengths (B,), as int64.

    An integer of any width is itself; from 2^63 on it stands as the negative number of the same 64 bits. A string
    is the integer that it writes in decimal, without a sign +, leading zeros or spaces, or else `hash_of_text` of it.
    Text may be of any encoding; ``1.0`` is the integer 1, as in a column of floats.
    Under ``hexadecimal`` a string is a number in base 16, and a column of int32 has such numbers read as signed.
    A null is `MISSING`; a null in place of a list is a list without ids.

    Args:
        column (pa.Array): of a type that passes `is_id_type`.
        hexadecimal (bool): how strings and int32 are read.
        report (Report): is called with the positions of wrong rows.

    Example:
        >>> id_values(pa.array(["10", "u_1", None]), False, print)[0].tolist()
        [10, -3225158911689277551, -9223372036854775808]
        >>> id_values(pa.array(["10", "ff"]), True, print)[0].tolist()
        [16, 255]
        >>> values, lengths = id_values(pa.array([[1, 2], None, [3]]), False, print)
        >>> values.tolist(), lengths.tolist()
        ([1, 2, 3], [2, 0, 1])
    """
    if not is_list(column.type):
        return _values(column, hexadecimal, report), None
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(column)), lengths)
    # Take the flattened column, because it lacks the values that null entries hide.
    flat = _values(column.flatten(), hexadecimal, lambda wrong, allowed: report(np.unique(row[wrong]), allowed))
    return flat, lengths


def hash_of_text(text: bytes) -> int:
    """Returns the first 16 hexadecimal digits of the MD5 of ``text`` as a signed 64-bit number.

    Example:
        >>> f"{hash_of_text(b'u_1') % 2**64:016x}", hashlib.md5(b"u_1").hexdigest()[:16]
        ('d33def0eb4933f91', 'd33def0eb4933f91')
    """
    return int.from_bytes(hashlib.md5(text, usedforsecurity=False).digest()[:8], "big", signed=True)


def _values(column: pa.Array, hexadecimal: bool, report: Report) -> Array:
    kind = column.type
    if types.is_dictionary(kind):
        return _by_distinct(column, hexadecimal, report)
    if _is_text(kind):
        if not (types.is_binary(kind) or types.is_string(kind)):
            column = column.cast(pa.large_binary())
        return _hexadecimal(column, report) if hexadecimal else _by_distinct(column.dictionary_encode(), False, report)
    if types.is_null(kind):
        return np.full(len(column), MISSING, np.int64)
    if types.is_floating(kind):
        return _of_floats(column, report)
    if types.is_decimal(kind):
        return _of_decimals(column, report)
    values = column.cast(pa.uint8()) if types.is_boolean(kind) else column
    values = values.fill_null(0).to_numpy(zero_copy_only=False)
    if hexadecimal and values.dtype == np.int32:
        values = values.view(np.uint32)
    values = values.view(np.int64) if values.dtype == np.uint64 else values.astype(np.int64)
    _report_reserved(values, report)
    return np.where(column.is_null().to_numpy(zero_copy_only=False), MISSING, values) if column.null_count else values


def _of_floats(column: pa.Array, report: Report) -> Array:
    # Read floats as ids, because pandas makes them of integers with nulls. Beyond 2^bits one stands for several.
    bits = {16: 11, 32: 24, 64: 53}[column.type.bit_width]
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)  # NaN for null
    exact = (np.abs(values) <= 2**bits) & (np.floor(values) == values)
    wrong = np.flatnonzero(~exact & ~np.isnan(values))
    if len(wrong):
        report(wrong, f"an integer, of a float up to 2^{bits}, or nothing")
    return np.where(exact, np.where(exact, values, 0).astype(np.int64), MISSING)


def _by_distinct(column: pa.DictionaryArray, hexadecimal: bool, report: Report) -> Array:
    """Reads each distinct value once."""
    distinct = column.dictionary
    if _is_text(distinct.type):
        distinct = distinct.cast(pa.large_binary())
    if len(distinct) > len(column):  # of a whole file: leave out the values that these rows lack
        return _values(distinct.take(column.indices), hexadecimal, report)

    def report_value(positions: Array, allowed: str) -> None:
        wrong = np.zeros(len(distinct) + 1, bool)
        wrong[positions] = True
        report(np.flatnonzero(wrong[index]), allowed)

    index = column.indices.cast(pa.int64()).fill_null(len(distinct)).to_numpy(zero_copy_only=False)
    values = np.empty(len(distinct) + 1, np.int64)
    if _is_text(distinct.type) and not hexadecimal:
        values[:-1] = _of_texts(distinct)
    else:
        values[:-1] = _values(distinct, hexadecimal, report_value)
    values[-1] = MISSING
    return values[index]


def _of_texts(distinct: pa.LargeBinaryArray) -> Array:
    values = np.empty(len(distinct), np.int64)
    number = pc.match_substring_regex(distinct, _CANONICAL).fill_null(False).to_numpy(zero_copy_only=False)
    for i, text in enumerate(distinct.to_pylist()):
        value = None
        if text is None or text == b"":
            value = MISSING
        elif number[i]:
            value = _signed(int(text.removesuffix(b".0")))
        values[i] = hash_of_text(text) if value is None else value
    return values


def _of_decimals(column: pa.Array, report: Report) -> Array:
    integers = [MISSING if value is None else _signed(int(value)) for value in column.to_pylist()]
    wrong = np.array([i for i, value in enumerate(integers) if value is None], np.int64)
    if len(wrong):
        report(wrong, ALLOWED_INTEGERS)
    return np.array([MISSING if value is None else value for value in integers], np.int64)


def _signed(integer: int) -> int | None:
    """Returns the signed number of the same 64 bits, or None: it is no id."""
    if -(2**63) < integer < 2**63:
        return integer
    return integer - 2**64 if 2**63 < integer < 2**64 else None


def _hexadecimal(texts: pa.Array, report: Report) -> Array:
    """Reads 8 characters as one 64-bit number, the first in its lowest byte, in place of one after the other."""
    _, offsets_buffer, data = texts.buffers()
    kind: Any = np.int64 if types.is_large_binary(texts.type) else np.int32
    offsets = np.frombuffer(offsets_buffer, kind, len(texts) + 1, texts.offset * np.dtype(kind).itemsize)
    lengths = np.diff(offsets)
    missing = lengths == 0
    if texts.null_count:  # a null may hide bytes
        missing |= texts.is_null().to_numpy(zero_copy_only=False)
    first, last = int(offsets[0]), int(offsets[-1])
    used = b"" if data is None else memoryview(data)[first:last].tobytes()
    # Put room before the text, because 16 characters are read up to the end of any value.
    codes = np.frombuffer((b"0" * _MAX_DIGITS + used).translate(_CODES), np.uint8)
    eight = np.ndarray(len(codes) - 7, "<u8", codes, strides=(1,))
    ends = offsets[1:] - first + _MAX_DIGITS
    low, wrong = _eight_digits(eight[ends - 8], np.minimum(lengths, 8))
    values = low
    if lengths.max(initial=0) > 8:
        high, wrong_high = _eight_digits(eight[ends - 16], np.clip(lengths - 8, 0, 8))
        values, wrong = (high << np.uint64(32)) | low, wrong | wrong_high | (lengths > _MAX_DIGITS)
    wrong &= ~missing
    if wrong.any():
        report(np.flatnonzero(wrong), _HEXADECIMAL)
        missing |= wrong
    ids = values.view(np.int64)
    ids[missing] = 0
    _report_reserved(ids, report)
    ids[missing] = MISSING
    return ids


def _eight_digits(codes: Array, lengths: Array) -> tuple[Array, Array]:
    """Returns the number that the last ``lengths`` of 8 digits write, and whether one of them is no digit."""
    if (lengths != 8).any():
        # NumPy's shift by 64 and more, of no characters, gives 0.
        shift = (64 - 8 * lengths).astype(np.uint64)
        codes = (codes >> shift) << shift
    wrong = (codes & _HIGH_BITS) != 0
    # The first character is the lowest byte and the highest digit: pairs, then fours, then all eight.
    codes = ((codes << np.uint64(4)) | (codes >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    codes = ((codes << np.uint64(8)) | (codes >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    return ((codes << np.uint64(16)) | (codes >> np.uint64(32))) & np.uint64(0xFFFFFFFF), wrong


def _report_reserved(values: Array, report: Report) -> None:
    reserved = values == MISSING
    if reserved.any():
        report(np.flatnonzero(reserved), ALLOWED_INTEGERS)


def _is_text(kind: pa.DataType) -> bool:
    return is_one_of(kind, _TEXTS)
