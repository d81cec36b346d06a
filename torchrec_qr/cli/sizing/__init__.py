"""Sizes a job for a cluster from its YAML, on a machine that has neither."""
