"""These tests need the wheel that ``make wheel`` builds: ``make test-wheel`` names it and the trios to them."""

import os

collect_ignore = [] if os.environ.get("TORCHREC_QR_TEST_WHEEL") else ["test_wheel.py"]
