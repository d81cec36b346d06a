"""Writes the golden files anew: ``python -m tests.golden.record``, for a change that means to move a rounding."""

from tests.golden.recordings import RECORDINGS, write

if __name__ == "__main__":
    for name, record in RECORDINGS.items():
        write(name, *record())
