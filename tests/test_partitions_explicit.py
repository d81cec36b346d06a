"""Partitions given class by class: what they select, what they refuse, and what checking them costs."""

import copy
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_qr.partitions import ExplicitPartitions

# {0, 1, 2, 3, 4} = {0} {1, 3, 4} {2} = {0, 1, 3} {2, 4} = {0, 3} {1, 2, 4}: arXiv:1909.02107, section 3.
PAPER_EXAMPLE = [[0, 1, 2, 1, 1], [0, 0, 1, 0, 1], [0, 1, 1, 0, 1]]


def test_the_papers_example() -> None:
    partitions = ExplicitPartitions(PAPER_EXAMPLE).bind(5)
    assert (partitions.num_embeddings, partitions.num_partitions, partitions.num_rows, partitions.main) == (5, 3, 7, 0)
    assert partitions.sizes == (3, 2, 2)
    assert partitions.is_complementary()
    rows = partitions.rows(torch.arange(5))
    assert rows.tolist() == [[0, 0, 0], [1, 0, 1], [2, 1, 1], [1, 0, 0], [1, 1, 1]]
    blocks = [[{x for x in range(5) if rows[x, j] == c} for c in range(partitions.sizes[j])] for j in range(3)]
    assert blocks == [[{0}, {1, 3, 4}, {2}], [{0, 1, 3}, {2, 4}], [{0, 3}, {1, 2, 4}]]


@pytest.mark.parametrize(("left_out", "twins"), [(0, "0 and 3"), (1, "1 and 4"), (2, "1 and 3")])
def test_the_papers_example_needs_all_three_partitions(left_out: int, twins: str) -> None:
    with pytest.raises(ValueError, match=f"got ids {twins} that share all classes"):
        ExplicitPartitions([row for j, row in enumerate(PAPER_EXAMPLE) if j != left_out]).bind(5)


def test_quotients_and_remainders_by_different_numbers_are_refused() -> None:
    """DeepRec#909: x // 100 and x % 5, where 7 and 12, and first of all 0 and 5, share both."""
    x = torch.arange(1000)
    classes = torch.stack([x // 100, x % 5])
    assert classes[:, 7].tolist() == classes[:, 12].tolist()
    told = (
        "ExplicitPartitions: classes must be complementary (no two ids with the same class in every partition), "
        "got ids 0 and 5 that share all classes [0, 0]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        ExplicitPartitions(classes).bind(1000)


def test_unused_classes_are_allowed() -> None:
    partitions = ExplicitPartitions([[7, 0, 7], [0, 0, 1]]).bind(3)
    assert partitions.sizes == (8, 2)
    assert partitions.rows(torch.tensor([2, 1], dtype=torch.int32)).tolist() == [[7, 1], [0, 0]]


def test_a_map_on_the_ids_device_takes_the_place_of_the_own_one() -> None:
    partitions = ExplicitPartitions(PAPER_EXAMPLE).bind(5)
    shifted = partitions.class_map + 10
    rows = partitions.class_rows(torch.tensor([2, 0]), class_map=shifted)
    assert [row.tolist() for row in rows] == [[12, 10], [11, 10], [11, 10]]


@pytest.mark.parametrize("outside", [5, -1])
def test_ids_outside_the_map_raise(outside: int) -> None:
    with pytest.raises(IndexError):
        ExplicitPartitions(PAPER_EXAMPLE).bind(5).rows(torch.tensor([0, outside]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_dtype_and_layout_do_not_matter(dtype: torch.dtype) -> None:
    given_map = torch.tensor(PAPER_EXAMPLE, dtype=dtype)
    strided = torch.tensor(PAPER_EXAMPLE, dtype=dtype).T.contiguous().T
    for classes in (given_map, strided, given_map.numpy()):
        partitions = ExplicitPartitions(classes).bind(5)
        assert partitions == ExplicitPartitions(PAPER_EXAMPLE).bind(5)
        assert hash(partitions) == hash(ExplicitPartitions(PAPER_EXAMPLE).bind(5))
        assert partitions.class_map.dtype == torch.int32
        assert partitions.class_map.is_contiguous()
        assert partitions.class_map.tolist() == PAPER_EXAMPLE


def test_the_map_is_int64_only_where_int32_is_too_narrow() -> None:
    assert ExplicitPartitions([[0, 2**31 - 1]]).bind(2).class_map.dtype == torch.int32
    wide = ExplicitPartitions([[0, 2**31]]).bind(2)
    assert wide.class_map.dtype == torch.int64
    assert wide.rows(torch.tensor([1])).tolist() == [[2**31]]


def test_the_map_is_a_copy() -> None:
    classes = torch.tensor(PAPER_EXAMPLE, dtype=torch.int32)
    spec = ExplicitPartitions(classes)
    classes.zero_()
    assert spec.bind(5).class_map.tolist() == PAPER_EXAMPLE


def test_construction_under_another_default_device() -> None:
    with torch.device("meta"):
        partitions = ExplicitPartitions(PAPER_EXAMPLE).bind(5)
    assert partitions == ExplicitPartitions(PAPER_EXAMPLE).bind(5)


def test_hash_of_the_content() -> None:
    bound = ExplicitPartitions(PAPER_EXAMPLE).bind(5)
    # sha256 of "3,5;" and the classes as little-endian int64, row by row: part of the checkpoint format.
    assert bound.sha256.startswith("b2f28fbcc063")
    assert len(bound.sha256) == 64
    assert repr(bound) == "ClassMap(num_embeddings=5, sizes=(3, 2, 2), sha256='b2f28fbcc063…')"
    assert repr(ExplicitPartitions(PAPER_EXAMPLE)) == "ExplicitPartitions(classes of shape (3, 5))"
    one_row, two_rows = ExplicitPartitions([[0, 1, 2, 3]]).bind(4), ExplicitPartitions([[0, 1], [2, 3]]).bind(2)
    assert one_row.sha256 != two_rows.sha256
    assert one_row != two_rows
    assert pickle.loads(pickle.dumps(bound)).sha256 == bound.sha256  # noqa: S301


def test_a_map_is_checked_and_read_once(tmp_path: Path) -> None:
    spec = ExplicitPartitions(PAPER_EXAMPLE)
    assert spec.bind(5) is spec.bind(5) is copy.deepcopy(spec).bind(5)
    np.save(tmp_path / "classes.npy", np.array(PAPER_EXAMPLE))
    from_file = ExplicitPartitions(file=str(tmp_path / "classes.npy"))
    assert from_file.bind(5) == spec.bind(5)
    (tmp_path / "classes.npy").unlink()
    assert pickle.loads(pickle.dumps(from_file)).bind(5) == spec.bind(5)  # noqa: S301


def test_classes_or_a_file() -> None:
    told = "ExplicitPartitions: exactly one of classes, file must be given, got "
    with pytest.raises(ValueError, match=f"^{told}none$"):
        ExplicitPartitions()
    with pytest.raises(ValueError, match=f"^{told}classes and file$"):
        ExplicitPartitions([[0, 1]], file="classes.npy")


def test_another_number_of_ids_is_refused() -> None:
    told = "ExplicitPartitions: num_embeddings must be 5, the ids of classes, got 6"
    with pytest.raises(ValueError, match=f"^{told}$"):
        ExplicitPartitions(PAPER_EXAMPLE).bind(6)


@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([2, 3, 2**15, 2**31, 2**40 - 1]), st.data())
def test_finds_the_first_id_that_shares_all_classes(count: int, num_ids: int, top: int, data: st.DataObject) -> None:
    """A dict finds the same ids. Some classes are so large that their product overflows int64."""
    few = st.one_of(st.integers(0, 2), st.integers(max(0, top - 3), top))
    ids = data.draw(st.lists(st.tuples(*[few] * count), min_size=num_ids, max_size=num_ids))
    seen: dict[Sequence[int], int] = {}
    twins = next(((seen[key], x) for x, key in enumerate(ids) if seen.setdefault(key, x) != x), None)
    classes = torch.tensor(ids).T
    if twins is None:
        assert ExplicitPartitions(classes).bind(num_ids).rows(torch.arange(num_ids)).tolist() == [
            list(key) for key in ids
        ]
    else:
        with pytest.raises(ValueError, match=f"ids {twins[0]} and {twins[1]} that share all classes "):
            ExplicitPartitions(classes).bind(num_ids)


def test_overflowing_codes_are_no_false_alarm() -> None:
    """A code of sizes 2^32 multiplies the first two of four classes by 2^96 and 2^64, so that an int64 loses them."""
    top = 2**32 - 1
    classes = [[0, 1, 0, top], [0, 0, 1, top], [0, 0, 0, top], [0, 0, 0, top]]
    partitions = ExplicitPartitions(classes).bind(4)
    assert math.prod(partitions.sizes) == 2**128
    assert partitions.rows(torch.arange(4)).T.tolist() == classes


MEASURE = """
import sys, torch
from torchrec_qr.partitions import ExplicitPartitions

# Of the address space, not of what is resident: a system may take idle pages from a process and give them back.
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

num_ids, top = 10**7, int(sys.argv[1])
classes = torch.empty(3, num_ids, dtype=torch.int32)
for start in range(0, num_ids, 2**20):  # in pieces, so that making the map leaves no peak behind
    x = torch.arange(start, min(start + 2**20, num_ids))
    classes[0, start:start + 2**20] = x * 7919 % 1009
    classes[1, start:start + 2**20] = x // 1009 % 101
    classes[2, start:start + 2**20] = x // (1009 * 101)
    del x
if top:
    classes[:, -1] = top
before = kib("VmSize")
print(ExplicitPartitions(classes).bind(num_ids).sizes)
print((kib("VmPeak") - before) * 1024 / (classes.numel() * classes.element_size()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")
@pytest.mark.parametrize(
    ("top", "sizes"),
    [(0, (1009, 101, 99)), (2**31 - 1, (2**31, 2**31, 2**31))],  # of the second the product overflows int64
)
def test_ten_million_ids_are_checked_in_little_memory(top: int, sizes: tuple[int, ...]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(top)], capture_output=True, text=True, check=True, timeout=250
    )
    outcome, growth = run.stdout.strip().split("\n")
    assert outcome == str(sizes)
    assert float(growth) < 4


# --- what is refused ---


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([], ValueError, "classes must be two-dimensional, (K, S), and not empty, got shape (0,)"),
        ([0, 1], ValueError, "classes must be two-dimensional, (K, S), and not empty, got shape (2,)"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "and not empty, got shape (2, 0)"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, "and not empty, got shape (0, 2)"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), ValueError, "and not empty, got shape (2, 2, 2)"),
        ([[0, 1], [0]], ValueError, "classes must be a (K, S) table of integers"),
        ([["a"]], ValueError, "classes must be a (K, S) table of integers"),
        ([[2**70]], ValueError, "classes must be a (K, S) table of integers"),
        (torch.zeros(2, 2), TypeError, "torch.int32, torch.int64, got torch.float32"),
        ([[0.0, 1.0]], TypeError, "classes must have one of the dtypes torch.uint8, "),
        (np.array([[True, False]]), TypeError, "got torch.bool"),
        (
            [[0, 1], [3, -2]],
            ValueError,
            "every class must be between 0 and 1099511627775 (2^40 - 1), got classes[1, 1] = -2",
        ),
        ([[0, 2**40]], ValueError, "(2^40 - 1), got classes[0, 1] = 1099511627776"),
        (torch.zeros(2, 2, dtype=torch.int64, device="meta"), ValueError, "got a tensor on the meta device"),
        (
            torch.zeros(1, 1, dtype=torch.int8).expand(1, 2**31 + 1),
            ValueError,
            "at most 2147483648 (2^31), got 2147483649",
        ),
        ([[4, 2, 4, 2], [1, 1, 1, 0]], ValueError, "got ids 0 and 2 that share all classes [4, 1]"),
    ],
)
def test_refused(classes: object, error: type[Exception], message: str) -> None:
    def bind() -> None:
        spec = ExplicitPartitions(classes)
        spec.bind(spec.classes.shape[1])

    with pytest.raises(error) as raised:
        bind()
    assert str(raised.value).startswith("ExplicitPartitions: ")
    assert message in str(raised.value)
