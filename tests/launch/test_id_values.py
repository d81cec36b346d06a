"""Category ids of Arrow columns: every type that pandas, polars and Spark write, as one 64-bit integer a value."""

import decimal
import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data.errors import BadRows
from launch.data.id_mapping import IdMapping
from launch.data.id_values import hash_of_text, id_values, is_id_type
from launch.data.rows import MISSING, Array, Rows


def read(column: pa.Array, hexadecimal: bool = False) -> tuple[list[int], list[int] | None]:
    """Ids, and lengths of lists; fails if a value is wrong."""

    def report(rows: Array, allowed: str) -> None:
        pytest.fail(f"{rows}: {allowed}")

    assert is_id_type(column.type)
    ids, lengths = id_values(column, hexadecimal, report)
    assert ids.dtype == np.int64
    return ids.tolist(), None if lengths is None else lengths.tolist()


def wrong_rows(column: pa.Array, hexadecimal: bool = False) -> list[int]:
    found: list[int] = []
    id_values(column, hexadecimal, lambda rows, _: found.extend(rows.tolist()))
    return sorted(found)


def hashed(text: str) -> int:
    value = int(hashlib.md5(text.encode()).hexdigest()[:16], 16)
    return value if value < 2**63 else value - 2**64


INTEGERS = [3, None, 100, 0]


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        *(pa.float32(), pa.float64(), pa.decimal128(20, 0)),
    ],
    ids=str,
)
def test_a_number_is_itself_whatever_its_type(kind: pa.DataType) -> None:
    column = pa.array(INTEGERS, pa.int64()).cast(kind)
    expected = [3, MISSING, 100, 0]
    assert read(column) == (expected, None)
    assert read(column.dictionary_encode()) == (expected, None)
    assert read(column.slice(1, 2)) == (expected[1:3], None)
    assert read(pa.array([str(i) if i is not None else None for i in INTEGERS])) == (expected, None)


BIG = "18446744073709551616"  # 2^64
NUMBERS = {"10": 10, None: MISSING, "": MISSING, "-3": -3, "1.0": 1, "18446744073709551615": -1}
OTHERS = ["u_1", "010", "ff", "ü", "1.00", BIG, " 7", "+7", "-0"]
TEXTS = [*NUMBERS, *OTHERS]
TEXT_IDS = [*NUMBERS.values(), *map(hashed, OTHERS)]
TEXT_TYPES = [
    *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()),
    *(pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string())),
]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_a_string_is_its_number_or_its_hash(kind: pa.DataType) -> None:
    texts = pa.array(TEXTS)
    column = texts.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else texts.cast(kind)
    assert read(column) == (TEXT_IDS, None)
    assert read(column.slice(4, 3)) == (TEXT_IDS[4:7], None)


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_hexadecimal(kind: pa.DataType) -> None:
    texts = pa.array(["ff", "FFFFFFFFFFFFFFFF", None, "", "10", "00000000000000a0", "123456789"])
    column = texts.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else texts.cast(kind)
    expected = [255, -1, MISSING, MISSING, 16, 160, 0x123456789]
    assert read(column, hexadecimal=True) == (expected, None)
    bad = pa.array(["1", "0x1f", "1" * 17, "g", None])
    column = bad.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else bad.cast(kind)
    assert wrong_rows(column, hexadecimal=True) == [1, 2, 3]


@given(st.lists(st.one_of(st.none(), st.integers(0, 2**64 - 1).filter(lambda x: x != 2**63)), min_size=1))
def test_one_hash_in_four_forms_is_one_id(values: list[int | None]) -> None:
    signed = [None if v is None else v - 2**64 * (v >= 2**63) for v in values]
    expected = [MISSING if v is None else v for v in signed]
    assert read(pa.array(values, pa.uint64()))[0] == expected
    assert read(pa.array(signed, pa.int64()))[0] == expected
    assert read(pa.array([None if v is None else str(v) for v in values]))[0] == expected
    for form in ("{:016x}", "{:X}"):
        assert read(pa.array([None if v is None else form.format(v) for v in values]), hexadecimal=True)[0] == expected


def test_a_32_bit_hash_that_was_read_as_signed() -> None:
    assert read(pa.array([-1, 5, None], pa.int32()), hexadecimal=True)[0] == [0xFFFFFFFF, 5, MISSING]
    assert read(pa.array([-1, 5, None], pa.int32()))[0] == [-1, 5, MISSING]


@pytest.mark.parametrize(
    "kind", [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda k: pa.list_(k, 2)], ids=range(5)
)
def test_lists(kind: Any) -> None:
    fixed = pa.types.is_fixed_size_list(kind(pa.int64()))
    numbers = [[1, 2], None, [3, 4]] if fixed else [[1, 2], None, [3], []]
    lengths = [2, 0, 2] if fixed else [2, 0, 1, 0]
    flat = [x for row in numbers if row for x in row]
    assert read(pa.array(numbers, kind(pa.int64()))) == (flat, lengths)
    texts = [None if row is None else [f"u{x}" for x in row] for row in numbers]
    assert read(pa.array(texts, kind(pa.string()))) == ([hashed(f"u{x}") for x in flat], lengths)
    holes = [None if row is None else [None, *row[1:]] if row else [] for row in numbers]
    assert read(pa.array(holes, kind(pa.int64())))[0] == [
        MISSING if i == 0 else x for row in numbers if row for i, x in enumerate(row)
    ]


@pytest.mark.parametrize("size", [1, 5, 128, 200])
@pytest.mark.parametrize("index", [pa.int8(), pa.uint8(), pa.int32()], ids=str)
@pytest.mark.parametrize(
    "kind",
    [*(pa.int32(), pa.uint64(), pa.bool_(), pa.float64(), pa.decimal128(20, 0)), *TEXT_TYPES[:6]],
    ids=str,
)
def test_dictionaries_of_any_size_with_nulls_and_repeated_values(
    size: int, index: pa.DataType, kind: pa.DataType
) -> None:
    numbers = [i % 2 if kind == pa.bool_() else i % 60 for i in range(size)]
    numbers[size // 2 :: 7] = [None] * len(numbers[size // 2 :: 7])
    text = [None if i is None else str(i) for i in numbers]
    if kind == pa.float64() or pa.types.is_decimal(kind) or pa.types.is_integer(kind) or kind == pa.bool_():
        values = pa.array(numbers, pa.int64()).cast(kind)
    else:
        values = pa.array(text).cast(kind)
    positions = [None if i % 9 == 4 else i % min(size, 128) for i in range(150)]
    column = pa.DictionaryArray.from_arrays(pa.array(positions, index), values)
    expected = [MISSING if i is None or numbers[i] is None else numbers[i] for i in positions]
    assert read(column)[0] == expected
    for start, stop in ((0, 3), (40, 45), (1, 150)):
        assert read(column.slice(start, stop - start))[0] == expected[start:stop]


def test_of_a_large_dictionary_the_values_of_the_rows_alone_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed_texts: list[bytes] = []
    monkeypatch.setattr(
        "launch.data.id_values.hash_of_text", lambda text: hashed_texts.append(text) or hash_of_text(text)
    )
    column = pa.array([f"u{i}" for i in range(1000)]).dictionary_encode().slice(500, 3)
    assert read(column)[0] == [hashed("u500"), hashed("u501"), hashed("u502")]
    assert sorted(hashed_texts) == [b"u500", b"u501", b"u502"]


def test_wrong_values_of_a_dictionary() -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 1, None], pa.int8()), pa.array(["g", "f", "0x"]))
    assert wrong_rows(column, hexadecimal=True) == [0, 2]
    assert wrong_rows(column.slice(1), hexadecimal=True) == [1]


@pytest.mark.parametrize(("kind", "most"), [(np.float16, 2**11), (np.float32, 2**24), (np.float64, 2**53)])
def test_a_float_is_an_id_as_long_as_it_is_one_integer_alone(kind: type, most: int) -> None:
    assert read(pa.array(kind([most, -most, 0])))[0] == [most, -most, 0]
    assert wrong_rows(pa.array(kind([most, 2 * most, -2 * most]))) == [1, 2]


def test_wrong_values() -> None:
    assert wrong_rows(pa.array([1.0, 1.5, float("nan"), float("inf"), 2.0**60, None])) == [1, 3, 4]
    assert wrong_rows(pa.array([0, 2**63, 2**64 - 1], pa.uint64())) == [1]
    assert wrong_rows(pa.array([0, -(2**63), None], pa.int64())) == [1]
    assert wrong_rows(pa.array([[1.0], [2.0, 2.5], []])) == [1]
    assert read(pa.array([decimal.Decimal(2**64 - 1), None]))[0] == [-1, MISSING]
    assert wrong_rows(pa.array([decimal.Decimal(x) for x in (2**63, 5, 2**64, -(2**63))])) == [0, 2, 3]
    for kind in (
        pa.decimal128(5, 2),
        pa.timestamp("s"),
        pa.struct([("a", pa.int64())]),
        pa.list_(pa.list_(pa.int64())),
    ):
        assert not is_id_type(kind)


def test_modulo_is_of_the_unsigned_number() -> None:
    values = [5, -1, MISSING, 2**40]
    for kind in (np.int64, np.int32):
        ids = np.array(values[:2] if kind is np.int32 else values, kind)[:, None]
        rows = Rows(np.zeros(len(ids), np.float32), np.zeros((len(ids), 0), np.float32), ids, (1,))
        mapped = IdMapping("modulo", ["a"], [1000])(rows, BadRows("error"), str, lambda *_: "")
        expected = [5, (2**64 - 1) % 1000, 0, 2**40 % 1000]
        assert mapped.ids[:, 0].tolist() == expected[: len(ids)]
