"""What `torchrec_qr.compress_` consists of: finding collections, choosing partitions, fitting them, replacing."""
