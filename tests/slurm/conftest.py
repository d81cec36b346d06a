"""These tests need the cluster of scripts/slurm_cluster.sh: ``make test-slurm`` starts it and tells them so."""

import os

collect_ignore = [] if os.environ.get("TORCHREC_QR_TEST_SLURM") else ["test_slurm_jobs.py"]
