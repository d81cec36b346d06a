"""The processes of a job, as torchrun, TorchX or nobody started them."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# How long a rank waits for others, which may be compiling, or reading their first rows. One that is gone is noticed at
# once, as its connections close; one whose network is gone only so.
TIMEOUT = timedelta(seconds=120)


def bound_waits() -> None:
    """Gives `TIMEOUT` to groups that others have made, as TorchRec within and across nodes, in place of 30 minutes."""
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(TIMEOUT, group)


def start_process_group() -> torch.device:
    """Joins the ranks of the environment, of which this is the only one where there is none; returns its device."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "MASTER_PORT" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    return device
