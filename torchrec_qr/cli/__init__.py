"""The command ``torchrec-qr`` and the YAML of jobs: applications of the library, which nothing else in it imports."""
