"""Lines of text files, plain or gzip, in large blocks of whole lines."""

import bisect
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from launch.data.errors import DataError, readable
from launch.data.prefetch import Prefetched

_READ = 1 << 19  # of a size that stays in the processor's cache while it is parsed
_CHUNKS_AHEAD = 8
_LONGEST_LINE = 1 << 26
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_OTHER_MAGIC = {
    b"PAR1": "Parquet",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class TextFile:
    """A text file whose lines are counted once, so that a reader can start near any of them.

    A byte order mark at its beginning is no part of the first line.

    Args:
        path (str | Path): a plain file, or a gzip file of any number of members, by its first two bytes.

    Attributes:
        num_lines (int): without blank lines at the end.
        last_line (bytes): the last one of these, without its end.
        is_cut (bool): True if no newline follows that.

    Raises:
        DataError: missing or unreadable; a gzip file that is truncated or corrupt, with the last whole line; a
            line that is too long.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # Each mark has a byte offset of the decompressed text, and the number of lines before it.
        self._marks = [(0, 0)]
        self.num_lines, self.last_line, self.is_cut = 0, b"", False
        self._count()

    def blocks(self, start: int) -> Generator[bytes, None, None]:
        """Yields the lines from line ``start`` (counted from 0) on, as blocks that end with a newline."""
        # Start at the last mark that is not beyond the line. The marks are in order of both numbers.
        offset, line = self._marks[bisect.bisect_right(self._marks, start, key=lambda mark: mark[1]) - 1]
        rest = b""
        # Decompress in another thread, because that needs no interpreter.
        with Prefetched(lambda: self._chunks(offset), _CHUNKS_AHEAD) as chunks:
            for chunk in chunks:
                data = rest + chunk if rest else chunk
                end = data.rfind(b"\n") + 1
                whole, rest = data[:end], data[end:]
                count = whole.count(b"\n")
                if line < start:
                    skipped = min(start - line, count)
                    line, count, whole = line + skipped, count - skipped, whole[lines_cut(whole, skipped) :]
                if line + count > self.num_lines:
                    count = self.num_lines - line
                    whole, rest = whole[: lines_cut(whole, count)], b""
                if whole:
                    yield whole
                line += count
        if rest and start <= line < self.num_lines:
            yield rest + b"\n"

    def _count(self) -> None:
        lines = offset = 0
        rest = b""
        try:
            for chunk in self._chunks(0):
                end = chunk.rfind(b"\n") + 1
                if end:
                    whole = rest + chunk[:end]
                    self._take(whole, lines)
                    lines += whole.count(b"\n")
                    self._marks.append((offset + end, lines))
                rest = chunk[end:] if end else rest + chunk
                offset += len(chunk)
                if len(rest) > _LONGEST_LINE:
                    problem = f"a line of more than {_LONGEST_LINE:,} bytes; allowed: lines that end in newlines"
                    raise DataError(str(self.path), problem)
        except DataError as error:
            if offset == 0:
                raise
            raise DataError(f"{self.path}:{lines + 1}", error.problem) from error
        self.is_cut = bool(rest.strip(b"\r"))
        self._take(rest, lines)

    def _take(self, text: bytes, line: int) -> None:
        """Notes the last line of ``text`` that is not blank; ``text`` begins at ``line``."""
        kept = text.rstrip(b"\r\n")
        if kept:
            self.num_lines = line + kept.count(b"\n") + 1
            self.last_line = kept[kept.rfind(b"\n") + 1 :]

    def _chunks(self, offset: int) -> Iterator[bytes]:
        """Yields the text from byte ``offset`` on."""
        with readable(self.path), open(self.path, "rb") as file:
            start = file.read(5)
            if not start.startswith(_GZIP_MAGIC):
                for magic, kind in _OTHER_MAGIC.items():
                    if start.startswith(magic):
                        raise DataError(str(self.path), f"a file of {kind}; allowed: text, plain or gzip")
                file.seek(offset + len(BYTE_ORDER_MARK) * start.startswith(BYTE_ORDER_MARK))
                while chunk := file.read(_READ):
                    yield chunk
                return
            file.seek(0)
            skipped = 0
            for chunk in _without_mark(_decompressed(file, str(self.path))):
                if skipped + len(chunk) > offset:
                    yield chunk[max(offset - skipped, 0) :]
                skipped += len(chunk)


def lines_cut(text: bytes, count: int) -> int:
    """Returns where the first ``count`` lines of ``text`` end.

    Example:
        >>> lines_cut(b"ab\\nc\\nd\\n", 2)
        5
    """
    position = 0
    for _ in range(count):
        position = text.index(b"\n", position) + 1
    return position


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    first = b""
    for chunk in chunks:
        first += chunk
        if len(first) >= len(BYTE_ORDER_MARK):
            break
    yield first.removeprefix(BYTE_ORDER_MARK)
    yield from chunks


def _decompressed(file: BinaryIO, name: str) -> Iterator[bytes]:
    # Do not use the gzip module, because Python 3.11's reads 8 KiB at a time.
    member = zlib.decompressobj(wbits=31)
    compressed = b""
    while True:
        compressed = compressed or file.read(_READ)
        if not compressed:
            break
        if member.eof:
            compressed = compressed.lstrip(b"\0")  # padding of tapes and blocks, which gzip ignores
            if not compressed:
                continue
            member = zlib.decompressobj(wbits=31)
        with readable(name, "gzip", zlib.error):
            chunk = member.decompress(compressed, _READ)
        compressed = member.unused_data if member.eof else member.unconsumed_tail
        if chunk:
            yield chunk
    if not member.eof:
        raise DataError(name, "a truncated gzip file: it ends in the middle of a member")
