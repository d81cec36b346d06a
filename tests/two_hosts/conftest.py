"""These tests make network namespaces, which needs root and ip: ``make test-two-hosts`` tells them that it may be."""

import os

collect_ignore = [] if os.environ.get("TORCHREC_QR_TEST_TWO_HOSTS") else ["test_two_hosts.py"]
