"""Leaves out noise of PyTorch and TorchRec, so that the output of a job is seen."""

import logging
import warnings


def silence_the_stack() -> None:
    """Leaves out the notes that PyTorch and TorchRec print at each start, on each rank."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    warnings.filterwarnings("ignore", message="fbgemm::.* an autograd kernel was not registered")
    # Reading a checkpoint in one process that has no group is meant.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger().addFilter(lambda record: "Sharding spec not found" not in record.getMessage())
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
