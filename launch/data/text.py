"""Lines of text files, plain or gzip, in large blocks of whole lines."""

import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from launch.data.errors import DataError
from launch.data.prefetch import Prefetched

_READ = 1 << 19  # of a size that stays in the processor's cache while it is parsed
_CHUNKS_AHEAD = 8
_GZIP_MAGIC = b"\x1f\x8b"


class TextFile:
    """A text file whose lines are counted once, so that a reader can start near any of them.

    Args:
        path: a plain file, or a gzip file of any number of members, by its first two bytes.

    Raises:
        DataError: missing, unreadable or empty; a gzip file that is truncated or corrupt, with the last whole line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # Byte offset (of the decompressed text) and number of lines before it, some megabytes apart.
        self._marks = [(0, 0)]
        self.num_lines = self._count()

    def blocks(self, start: int) -> Generator[bytes, None, None]:
        """Yields the lines from line ``start`` (counted from 0) on, as blocks that end with a newline."""
        offset, line = max(mark for mark in self._marks if mark[1] <= start)
        rest = b""
        # Decompression, which needs no interpreter, beside its consumer.
        with Prefetched(lambda: self._chunks(offset), _CHUNKS_AHEAD) as chunks:
            for chunk in chunks:
                data = rest + chunk if rest else chunk
                end = data.rfind(b"\n") + 1
                whole, rest = data[:end], data[end:]
                if line < start:
                    skipped = min(start - line, whole.count(b"\n"))
                    line, whole = line + skipped, _without_lines(whole, skipped)
                if whole:
                    yield whole
        if rest and line >= start:
            yield rest + b"\n"

    def _count(self) -> int:
        lines = offset = 0
        last = b"\n"
        try:
            for chunk in self._chunks(0):
                end = chunk.rfind(b"\n") + 1
                lines += chunk.count(b"\n")
                offset += len(chunk)
                if end:
                    self._marks.append((offset - len(chunk) + end, lines))
                last = chunk[-1:]
        except DataError as error:
            if offset == 0:
                raise
            raise DataError(f"{self.path}:{lines + 1}", error.problem) from error
        if offset == 0:
            raise DataError(str(self.path), "empty")
        return lines + (last != b"\n")

    def _chunks(self, offset: int) -> Iterator[bytes]:
        """Yields the text from byte ``offset`` on."""
        with readable(self.path), open(self.path, "rb") as file:
            if file.read(2) != _GZIP_MAGIC:
                file.seek(offset)
                while chunk := file.read(_READ):
                    yield chunk
                return
            file.seek(0)
            skipped = 0
            for chunk in _decompressed(file, str(self.path)):
                if skipped + len(chunk) > offset:
                    yield chunk[max(offset - skipped, 0) :]
                skipped += len(chunk)


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turns the operating system's errors of reading ``path`` into `DataError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(str(path), "no such file") from error
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error.strerror or error}") from error


def _without_lines(text: bytes, count: int) -> bytes:
    position = 0
    for _ in range(count):
        position = text.index(b"\n", position) + 1
    return text[position:]


def _decompressed(file: BinaryIO, name: str) -> Iterator[bytes]:
    # Not the gzip module, which reads 8 KiB at a time.
    member = zlib.decompressobj(wbits=31)
    compressed = b""
    while True:
        compressed = compressed or file.read(_READ)
        if not compressed:
            break
        if member.eof:
            if not compressed.strip(b"\0"):  # padding of tapes and blocks, which gzip ignores
                compressed = b""
                continue
            member = zlib.decompressobj(wbits=31)
        try:
            chunk = member.decompress(compressed, _READ)
        except zlib.error as error:
            raise DataError(name, f"not a gzip file, or a corrupt one: {error}") from error
        compressed = member.unused_data if member.eof else member.unconsumed_tail
        if chunk:
            yield chunk
    if not member.eof:
        raise DataError(name, "a truncated gzip file: it ends in the middle of a member")
