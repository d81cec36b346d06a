"""These tests need the head of scripts/ray_head.sh, and to run where it is: ``make test-ray`` sees to both."""

import os

collect_ignore = [] if os.environ.get("TORCHREC_QR_TEST_RAY") else ["test_ray_jobs.py"]
