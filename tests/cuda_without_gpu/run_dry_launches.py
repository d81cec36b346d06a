"""Usage: ``run_dry_launches.py``. A program, because Triton's driver and the folder of its cache are a process's."""

import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    sys.path[:0] = map(str, Path(__file__).parents[1:3])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        import dry_steps

        dry_steps.run_all()


if __name__ == "__main__":
    main()
