"""``python -m torchrec_qr.cli``."""

from torchrec_qr.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
