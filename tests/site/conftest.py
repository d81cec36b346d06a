"""These tests need a built site and Chromium: ``make test-docs`` has both."""

import os

collect_ignore = [] if os.environ.get("TORCHREC_QR_TEST_SITE") else ["test_built_site.py"]
