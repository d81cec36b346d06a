"""Click logs in Criteo's form: read from TSV, npy, Parquet or a generator, split, sharded by rank, and batched."""
